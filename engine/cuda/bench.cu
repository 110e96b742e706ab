// What `codecllm bench` measures memory with.
#include "common.cuh"

constexpr uint32_t READ_THREADS = 512;
constexpr uint32_t READ_AHEAD = 8;  // loads of 16 bytes that a thread has on the way

struct ReadMemory {
    const uint4* data;  // [n_tiles][READ_AHEAD][READ_THREADS]
    uint32_t* sum;      // the exclusive or of all words is put into it
    uint64_t n_tiles;
};

// Reads memory once, and leaves a number that depends on every word.
extern "C" __global__ void __launch_bounds__(READ_THREADS) read_memory(const __grid_constant__ ReadMemory p) {
    wait_for_previous();
    start_next();
    uint32_t sum = 0;
    for (uint64_t tile = blockIdx.x; tile < p.n_tiles; tile += gridDim.x) {
        const uint4* data = p.data + tile * READ_AHEAD * READ_THREADS + threadIdx.x;
        uint4 words[READ_AHEAD];
#pragma unroll
        for (uint32_t i = 0; i < READ_AHEAD; i++) words[i] = __ldcs(data + i * READ_THREADS);
#pragma unroll
        for (uint32_t i = 0; i < READ_AHEAD; i++) sum ^= words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
    }
    for (int step = 16; step; step /= 2) sum ^= __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0 && sum) atomicXor(p.sum, sum);
}
