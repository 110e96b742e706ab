// What a launch of the kernels on encoded tensors is told, and how it is shared out to thread blocks and warps.
#pragma once
#include "decode.cuh"

constexpr u32 MAX_TASKS = 8;

// One tensor's part of a launch. engine/src/cuda/encoded.rs has the same structure, and the next.
struct Task {
    Matrix matrix;
    void* out;          // codes u8 or u16, or bf16 [n_rows, n_cols]; gathered rows: f32 [n_tokens, n_cols]; products: [n_tokens, n_rows]
    const void* bias;   // [n_rows], added to products; may be null
    u32 first_cta, n_ctas;
    // Products: row blocks of each of these thread blocks (of two, if they are paired), of which the first `more_rows` have one more; and blocks of each warp
    // that decodes, of which the first `more_blocks` have one more, in thread blocks with `rows` and in the others.
    u32 rows, more_rows;
    u32 blocks[2], more_blocks[2];
    u16 codec;          // G and K, or 0 for any: see with_codec
    u16 adds;           // the product is added to what `out` holds
};
struct Launch {
    const void* x;        // one token: [n_cols]; more: from prepare_*
    const double* units;  // [token], int8: what one of a fixed-point activation is worth
    union {
        const float* norm;  // one token: [n_cols], the weight of an RMS norm that x goes through; may be null
        const u32* tokens;  // gather: [n_tokens], the rows
    };
    float eps;
    u32 table_bytes;      // of the largest table
    u32 n_slots;          // one token: of sums, of a task and thread block
    u8 n_tasks, n_tokens;
    u8 gated;             // there are two products of as many rows, of which each thread block has both; the first one's output is silu(first) * second
    u8 bf16;              // the activations of one token, biases and products are bf16, not f32
    u8 n_decoders;        // more than one token: the warps that decode
    u8 raw_words;         // see prefetch_raw
    u8 paired;            // one token: thread blocks two by two, each two a cluster, have row blocks together
    u8 eager;             // EARLY: the next kernel may start at once; else once this one's first blocks are decoded
    u16 window;           // the same: bytes of each warp's ring and parts; or of its tiles
    Task tasks[MAX_TASKS];
};

__device__ __forceinline__ const Task& find_task(const Launch& launch) {
    u32 t = 0;
    while (t + 1 < launch.n_tasks && blockIdx.x >= launch.tasks[t + 1].first_cta) t++;
    return launch.tasks[t];
}

// Things shared out as evenly as can be, in order: `each` to everyone, and one more to the first `more`.
struct Even {
    u32 each, more;

    // The first one's of `who`.
    __device__ __forceinline__ u32 begin(u32 who) const { return each * who + min(who, more); }
    // Who has a thing.
    __device__ __forceinline__ u32 owner(u32 thing) const {
        const u32 wide = more * (each + 1);
        return thing < wide ? thing / (each + 1) : more + (thing - wide) / each;
    }
};

// The blocks of a task that a thread block has, all of some row blocks, shared out to its warps. Paired thread blocks have theirs together, half of the blocks
// each, and the second one's warps follow those of the first one that have any.
struct Part {
    u32 first_row, n_rows;  // row blocks
    Even warps;             // of a thread block
    u32 n_warps, half;      // of the first one, if they are paired; else `half` is 0

    __device__ __forceinline__ Part(const Task& task, u32 n_warps_ = 0, u32 paired = 0) {
        const u32 c = (blockIdx.x - task.first_cta) >> paired, wide = c < task.more_rows;
        first_row = task.rows * c + min(c, task.more_rows), n_rows = task.rows + wide;
        warps = {task.blocks[wide], task.more_blocks[wide]};
        half = paired ? n_rows * task.matrix.n_col_blocks / 2 : 0, n_warps = min(n_warps_, half);
    }
    // Whose a block is.
    __device__ __forceinline__ u32 owner(u32 block) const {
        return half && block >= half ? n_warps + warps.owner(block - half) : warps.owner(block);
    }
};

// Whether this is the second of two thread blocks.
__device__ __forceinline__ u32 is_second(u32 paired) { return blockIdx.x & paired; }

// Paired thread blocks: the second one leaves a number in the first one's shared memory, at the place that has this address here.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void store_in_first(u32 at, u64 v) {
    asm volatile("{.reg .u32 there; mapa.shared::cluster.u32 there, %0, 0; st.shared::cluster.u64 [there], %1;}" ::"r"(at), "l"(v) : "memory");
}
#else
__device__ __forceinline__ void store_in_first(u32, u64) {}
#endif
