// What instructions of one kind reach when nothing else is in their way: a JSON line for each.
//
// Built and run by ceilings.py. Each kernel repeats its instruction on registers or shared memory;
// what it computes is compared with the host, so that a rate is that of real work.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                  \
    do {                                                                             \
        cudaError_t status = (call);                                                 \
        if (status != cudaSuccess) {                                                 \
            fprintf(stderr, "line %d: %s\n", __LINE__, cudaGetErrorString(status));  \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)

// ------------------------------------------------------------------ exponentials, 8 in flight

constexpr int CHAINS = 8;

__global__ void exp2_kernel(float* out, int iterations) {
    float x[CHAINS];
    for (int i = 0; i < CHAINS; ++i) x[i] = 0.1f * i + 1e-3f * threadIdx.x;
    for (int n = 0; n < iterations; ++n) {
#pragma unroll
        for (int repeat = 0; repeat < 4; ++repeat) {
#pragma unroll
            // Goes to the one number that is its own 2^-x; the sign costs no instruction.
            for (int i = 0; i < CHAINS; ++i)
                asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(x[i]) : "f"(-x[i]));
        }
    }
    float sum = 0;
    for (int i = 0; i < CHAINS; ++i) sum += x[i];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// ------------------------------------------------------------------ shared memory, 16 bytes a lane

constexpr int READERS = 256, READS = 8;

__global__ void shared_kernel(uint32_t* out, int iterations) {
    __shared__ uint4 memory[READERS * READS];
    for (int i = threadIdx.x; i < READERS * READS; i += READERS)
        memory[i] = make_uint4(i, i * 7, i * 31, i * 127);
    __syncthreads();
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(memory + threadIdx.x));
    uint32_t total = 0;
    for (int n = 0; n < iterations; ++n) {
#pragma unroll
        for (int k = 0; k < READS; ++k) {
            uint4 v;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                         : "r"(address + k * READERS * 16));
            total ^= v.x ^ v.y ^ v.z ^ v.w;
        }
    }
    out[blockIdx.x * READERS + threadIdx.x] = total;
}

// ------------------------------------------------------------------ mma.sync, 8 in flight a warp

constexpr int TILES = 8;

__device__ uint32_t pair(const __nv_bfloat16* at) {
    return *reinterpret_cast<const uint32_t*>(at);
}

// a [16, 16], b [64, 16], out [16, 64] of the first warp: iterations * a b^T.
__global__ void mma_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* out,
                           int iterations) {
    int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
    const __nv_bfloat16* corner = a + row * 16 + column;
    uint32_t fa[4] = {pair(corner), pair(corner + 128), pair(corner + 8), pair(corner + 136)};
    uint32_t fb[TILES][2];
    float c[TILES][4] = {};
    for (int j = 0; j < TILES; ++j) {
        const __nv_bfloat16* tile = b + (j * 8 + row) * 16 + column;
        fb[j][0] = pair(tile), fb[j][1] = pair(tile + 8);
    }
    for (int n = 0; n < iterations; ++n) {
#pragma unroll
        for (int j = 0; j < TILES; ++j)
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
                : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[j][0]), "r"(fb[j][1]));
    }
    // Other warps write nothing that is read, but the compiler cannot know that they are not first.
    float* mine = out + (blockIdx.x * blockDim.x + threadIdx.x) / 32 * (16 * 64);
    for (int j = 0; j < TILES; ++j)
        for (int i = 0; i < 4; ++i)
            mine[(row + i / 2 * 8) * 64 + j * 8 + column + i % 2] = c[j][i];
}

// ------------------------------------------------------------------ wgmma, m64n128k16

#ifdef HAS_WGMMA

constexpr int ROWS = 64, COLUMNS = 128, DEPTH = 64, SLICES = DEPTH / 16;

#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
#define F64 F16(0), F16(16), F16(32), F16(48)
#define PLACES                                                                         \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// Rows of 16 bf16 as core matrices of 8 rows x 16 bytes: 128 bytes to the next one along the
// depth, 256 to the next eight rows, no swizzle.
__device__ uint64_t descriptor(const void* memory) {
    uint64_t address = __cvta_generic_to_shared(memory);
    return (address & 0x3FFFF) >> 4 | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32;
}

__device__ int place_of(int row, int k) {
    return row / 8 * 128 + k / 8 * 64 + row % 8 * 8 + k % 8;
}

__device__ void multiply_shared(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, 1, 0;"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " PLACES
        ", %64, %65, p, 1, 1, 0, 0;}"
        : F64
        : "l"(a), "l"(b));
}

__device__ void multiply_registers(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, 1, 0;"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " PLACES
        ", {%64, %65, %66, %67}, %68, p, 1, 1, 0;}"
        : F64
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// a [64, 64], b [128, 64], out [64, 128] of each block: iterations * a b^T.
template <bool FROM_REGISTERS>
__global__ void __launch_bounds__(128, 4)
    wgmma_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* out, int iterations) {
    __shared__ __align__(128) __nv_bfloat16 rows[SLICES][ROWS * 16];
    __shared__ __align__(128) __nv_bfloat16 columns[SLICES][COLUMNS * 16];
    for (int i = threadIdx.x; i < ROWS * DEPTH; i += 128)
        rows[i % DEPTH / 16][place_of(i / DEPTH, i % 16)] = a[i];
    for (int i = threadIdx.x; i < COLUMNS * DEPTH; i += 128)
        columns[i % DEPTH / 16][place_of(i / DEPTH, i % 16)] = b[i];
    // What ordinary stores wrote is for the tensor cores to read.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();

    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
    uint32_t fa[SLICES][4];
    for (int s = 0; s < SLICES; ++s)
        for (int i = 0; i < 4; ++i)
            fa[s][i] = pair(a + (row + i % 2 * 8) * DEPTH + s * 16 + column + i / 2 * 8);
    float d[64];
    for (int i = 0; i < 64; ++i) d[i] = 0;
    for (int n = 0; n < iterations; ++n) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int s = 0; s < SLICES; ++s) {
            if (FROM_REGISTERS)
                multiply_registers(d, fa[s], descriptor(columns[s]));
            else
                multiply_shared(d, descriptor(rows[s]), descriptor(columns[s]));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    float* mine = out + blockIdx.x * (ROWS * COLUMNS);
    for (int i = 0; i < 64; ++i)
        mine[(row + i % 4 / 2 * 8) * COLUMNS + i / 4 * 8 + column + i % 2] = d[i];
}

#endif

// ------------------------------------------------------------------ host

// Median milliseconds of 11 launches, after 3.
template <typename Launch>
double milliseconds(Launch launch) {
    cudaEvent_t start, end;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    std::vector<float> samples;
    for (int i = 0; i < 14; ++i) {
        float elapsed;
        CHECK(cudaEventRecord(start));
        launch();
        CHECK(cudaGetLastError());
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&elapsed, start, end));
        if (i >= 3) samples.push_back(elapsed);
    }
    std::sort(samples.begin(), samples.end());
    return samples[samples.size() / 2];
}

void print(const char* what, double amount, double ms, const char* unit, double scale,
           double error) {
    printf("{\"what\": \"%s\", \"value\": %.6g, \"unit\": \"%s\", \"ms\": %.4f, \"error\": %.3g}\n",
           what, amount / ms * 1e3 / scale, unit, ms, std::isfinite(error) ? error : 1e30);
    fflush(stdout);
}

std::vector<__nv_bfloat16> random_values(int count) {
    std::vector<__nv_bfloat16> values(count);
    for (auto& value : values) value = __float2bfloat16(2.0f * rand() / RAND_MAX - 1);
    return values;
}

template <typename T>
T* to_device(const std::vector<T>& values) {
    T* memory;
    CHECK(cudaMalloc(&memory, values.size() * sizeof(T)));
    CHECK(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return memory;
}

template <typename T>
std::vector<T> to_host(const T* memory, size_t count) {
    std::vector<T> values(count);
    CHECK(cudaMemcpy(values.data(), memory, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
}

// || got - times * a b^T || / || times * a b^T ||
double error_of_product(const std::vector<float>& got, const std::vector<__nv_bfloat16>& a,
                        const std::vector<__nv_bfloat16>& b, int rows, int columns, int depth,
                        double times) {
    double off = 0, size = 0;
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) {
            double sum = 0;
            for (int k = 0; k < depth; ++k)
                sum += double(__bfloat162float(a[i * depth + k])) *
                       __bfloat162float(b[j * depth + k]);
            double difference = got[i * columns + j] - times * sum;
            off += difference * difference, size += times * sum * times * sum;
        }
    return std::sqrt(off / size);
}

int main() {
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    int processors = device.multiProcessorCount;

    {
        int iterations = 4096, blocks = processors * 8, threads = 256;
        float* out;
        CHECK(cudaMalloc(&out, sizeof(float) * blocks * threads));
        double ms = milliseconds([&] { exp2_kernel<<<blocks, threads>>>(out, iterations); });
        double amount = 4.0 * CHAINS * iterations * blocks * threads, exact = 0.641185744504986;
        double error = std::abs(to_host(out, 1)[0] / (CHAINS * exact) - 1);
        print("exp2 in CUDA", amount, ms, "Texp/s", 1e12, error);
    }
    {
        // Odd, so that what is read does not cancel.
        int iterations = 4097, blocks = processors * 4;
        uint32_t* out;
        CHECK(cudaMalloc(&out, sizeof(uint32_t) * blocks * READERS));
        double ms = milliseconds([&] { shared_kernel<<<blocks, READERS>>>(out, iterations); });
        uint32_t exact = 0;
        for (uint32_t i = 3; i < READERS * READS; i += READERS)
            exact ^= i ^ i * 7 ^ i * 31 ^ i * 127;
        double amount = 16.0 * READS * iterations * blocks * READERS;
        print("shared memory reads", amount, ms, "TB/s", 1e12, to_host(out, 4)[3] != exact);
    }
    {
        int iterations = 16384, blocks = processors * 2, threads = 256;
        int warps = blocks * threads / 32;
        auto a = random_values(16 * 16), b = random_values(64 * 16);
        float* out;
        CHECK(cudaMalloc(&out, sizeof(float) * warps * 16 * 64));
        auto *on_device_a = to_device(a), *on_device_b = to_device(b);
        double ms = milliseconds(
            [&] { mma_kernel<<<blocks, threads>>>(on_device_a, on_device_b, out, iterations); });
        double amount = 2.0 * 16 * 64 * 16 * iterations * warps;
        double error = error_of_product(to_host(out, 16 * 64), a, b, 16, 64, 16, iterations);
        print("mma.sync m16n8k16 bf16", amount, ms, "TFLOP/s", 1e12, error);
    }
#ifdef HAS_WGMMA
    for (bool from_registers : {false, true}) {
        int iterations = 4096, blocks = processors * 4;
        auto a = random_values(ROWS * DEPTH), b = random_values(COLUMNS * DEPTH);
        float* out;
        CHECK(cudaMalloc(&out, sizeof(float) * blocks * ROWS * COLUMNS));
        auto *on_device_a = to_device(a), *on_device_b = to_device(b);
        auto kernel = from_registers ? wgmma_kernel<true> : wgmma_kernel<false>;
        double ms = milliseconds(
            [&] { kernel<<<blocks, 128>>>(on_device_a, on_device_b, out, iterations); });
        double amount = 2.0 * ROWS * COLUMNS * DEPTH * iterations * blocks;
        auto got = to_host(out, ROWS * COLUMNS);
        double error = error_of_product(got, a, b, ROWS, COLUMNS, DEPTH, iterations);
        print(from_registers ? "wgmma m64n128k16 bf16, A in registers"
                             : "wgmma m64n128k16 bf16, A in shared memory",
              amount, ms, "TFLOP/s", 1e12, error);
    }
#endif
    return 0;
}
