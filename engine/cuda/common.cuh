// What all kernels share.
#pragma once
#include <cuda_bf16.h>
#include <cstdint>

// What GPUs before Hopper do not have stands below as what it comes to there: kernels one after the other, and clusters of one thread block.
#if __CUDA_ARCH__ >= 900

// Waits until the kernels before this one are done and their writes are seen. Every kernel executes it before it
// touches what another one writes: kernels start before their predecessors have ended (programmatic dependent launch).
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel start as soon as there is room for it, to do what depends on no other kernel.
__device__ __forceinline__ void start_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Thread blocks of a cluster.
__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t n;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return n;
}

// To be followed by wait_cluster, after which all thread blocks of the cluster have started. What was written before is not yet seen.
__device__ __forceinline__ void start_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

// Waits for all threads of the cluster that have not ended; what they wrote before they arrived is seen afterwards.
__device__ __forceinline__ void arrive_cluster() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ void sync_cluster() { arrive_cluster(), wait_cluster(); }

// Stores a number where `at` is in the shared memory of the cluster's thread block `block`, which has to have started, and is not to end before this one says
// that it is through.
__device__ __forceinline__ void put_in_block(float& at, uint32_t block, float value) {
    asm volatile("{.reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2;}"
                 ::"r"((uint32_t)__cvta_generic_to_shared(&at)), "r"(block), "f"(value) : "memory");
}

#else

__device__ __forceinline__ void wait_for_previous() {}
__device__ __forceinline__ void start_next() {}
__device__ __forceinline__ uint32_t cluster_size() { return 1; }
__device__ __forceinline__ void start_cluster() {}
__device__ __forceinline__ void arrive_cluster() {}
__device__ __forceinline__ void wait_cluster() {}
__device__ __forceinline__ void sync_cluster() { __syncthreads(); }
__device__ __forceinline__ void put_in_block(float& at, uint32_t, float value) { at = value; }

#endif

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// The sum over a block of up to 32 warps, known to every thread. All threads call it; the order of additions is fixed.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float partial[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_sum(lane < (blockDim.x + 31) / 32 ? partial[lane] : 0.0f);
}

// The two values of a word of BF16, the lower one first.
__device__ __forceinline__ float2 widen(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
