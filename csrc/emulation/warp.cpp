#include "warp.h"

namespace videoswin::emulation {
namespace {

struct Exchange {
  uint32_t value;
  unsigned source;
};

void combine_exchange(Arguments arguments, unsigned mask) {
  uint32_t values[32];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const bool is_here = mask >> lane & 1;
    values[lane] = is_here ? static_cast<Exchange*>(arguments[lane])->value : ~0u;
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    auto* const exchange = static_cast<Exchange*>(arguments[__builtin_ctz(rest)]);
    exchange->value = values[exchange->source];
  }
}

void combine_ballot(Arguments arguments, unsigned mask) {
  unsigned votes = 0;
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    votes |= (*static_cast<unsigned*>(arguments[lane]) ? 1u : 0u) << lane;
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    *static_cast<unsigned*>(arguments[__builtin_ctz(rest)]) = votes;
  }
}

}  // namespace

uint32_t exchange(unsigned mask, uint32_t value, unsigned source, const Place& place) {
  Exchange exchange{value, source};
  meet(mask, place, &exchange, combine_exchange);
  return exchange.value;
}

unsigned ballot(unsigned mask, bool predicate, const Place& place) {
  unsigned vote = predicate;
  meet(mask, place, &vote, combine_ballot);
  return vote;
}

}  // namespace videoswin::emulation
