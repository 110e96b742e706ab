// Kernels on encoded tensors: decode to codes or to BF16, gather rows, and products with 1 to 16 tokens.
//
// Each is one decoder (decode.cuh) with another sink. A launch takes several tensors, each of which gets a share of the thread blocks, and
// so loads its table once a thread block; the warps go over its blocks.
#include "common.cuh"
#include "decode.cuh"

constexpr u32 MAX_TASKS = 8;
constexpr u32 SCRATCH_BYTES = 256;  // of a warp that multiplies, behind its ring
constexpr u32 BLOCK_UNITS = 8;  // of a block that is decoded to tiles (BlockSink), at most
constexpr u32 MAX_ROWS = 128;  // row blocks of a thread block that multiplies

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

template <int FORMAT>
__device__ __forceinline__ float scale_of(const Matrix& m, u32 row) {
    if (m.scale_kind == 0) return 1;
    if (m.scale_kind == 1) return *(const float*)m.scales;
    if (m.scale_kind == 2) return ((const float*)m.scales)[row];
    const float absmax = __uint_as_float((u32)((const u16*)m.scales)[row] << 16);
    const float scale = __fdiv_rn(absmax, FORMAT == INT8 ? 127.0f : 448.0f);
    return scale < 1.17549435e-38f ? 0 : scale;
}

// Brings the scales of row block i as near as the L2 cache, where there is one for every row: all thread blocks at once would wait for a single one.
__device__ __forceinline__ void prefetch_scales(const Matrix& m, u32 i) {
    const u32 bytes = m.scale_kind == 2 ? 128 : 64;
    if (m.scale_kind > 1) asm volatile("prefetch.global.L2 [%0];" ::"l"((const u8*)m.scales + (u64)i * bytes));
}

// The number that a code stands for, before the scale.
template <int FORMAT>
__device__ __forceinline__ float value_of(u32 code) {
    if (FORMAT == INT8) return (float)(i32)(signed char)code;
    if (FORMAT == BF16) return __uint_as_float(code << 16);
    // The exponent's bias is 7, a float's 127. NaN is the only magnitude that the product would miss.
    const float v = __uint_as_float((code & 0x7f) << 20) * 0x1p120f;
    return (code & 0x7f) == 0x7f ? __int_as_float(0x7fffffff) : code & 0x80 ? -v : v;
}

template <int FORMAT>
__device__ __forceinline__ u32 code_at(Quad quad, int i) {
    if (FORMAT == BF16) return (i < 2 ? quad.a : quad.b) >> (16 * (i % 2)) & 0xffff;
    return quad.a >> (8 * i) & 0xff;
}

// A quad's values as two pairs of bf16. fp8 fits exactly.
template <int FORMAT>
__device__ __forceinline__ Quad to_bf16(Quad quad, float scale) {
    if (FORMAT == BF16) return quad;
    if (FORMAT == INT8) {
        // The code plus 128 as the lowest bits of 2^23.
        const u32 code = quad.a ^ 0x80808080;
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = (__uint_as_float(prmt(code, 0x4b000000, 0x7540 + i)) - 8388736.0f) * scale;
        const __nv_bfloat162 low = __floats2bfloat162_rn(v[0], v[1]), high = __floats2bfloat162_rn(v[2], v[3]);
        return {*(const u32*)&low, *(const u32*)&high};
    }
    u32 pair[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float v0 = value_of<FORMAT>(code_at<FORMAT>(quad, 2 * i)) * scale, v1 = value_of<FORMAT>(code_at<FORMAT>(quad, 2 * i + 1)) * scale;
        const __nv_bfloat162 both = __floats2bfloat162_rn(v0, v1);
        pair[i] = *(const u32*)&both;
    }
    return {pair[0], pair[1]};
}

// Zeros in place of the columns from `n` on: what lies there is not the matrix's, and might be no number.
template <int ELEMENT>
__device__ __forceinline__ Quad first_columns(Quad quad, i32 n) {
    const u64 all = (u64)quad.b << 32 | quad.a;
    const i32 bits = 8 * ELEMENT * max(n, 0);
    const u64 kept = bits >= 32 * ELEMENT ? all : all & ((1ull << bits) - 1);
    return {(u32)kept, (u32)(kept >> 32)};
}

// 32 rows × BYTES in shared memory, swizzled by 16 bytes so that neither a column of rows nor a row conflicts.
template <int BYTES>
struct Tile {
    u32 base;
    static __device__ __forceinline__ u32 offset(u32 row, u32 byte) {
        const u32 turn = BYTES == 32 ? row >> 2 & 1 : BYTES == 64 ? row >> 1 & 3 : row & 15;
        return row * BYTES + ((byte ^ turn * 16) & (BYTES - 1));
    }
    __device__ __forceinline__ void store(u32 row, u32 byte, u32 a, u32 b, u32 c, u32 d) const {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(base + offset(row, byte)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
    }
    __device__ __forceinline__ uint4 load(u32 row, u32 byte) const {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(base + offset(row, byte)) : "memory");
        return v;
    }
    template <int ELEMENT>
    __device__ __forceinline__ void put(u32 row, u32 byte, u32 value) const {
        const u32 at = base + offset(row, byte);
        if (ELEMENT == 1) asm volatile("st.shared.u8 [%0], %1;" ::"r"(at), "r"(value) : "memory");
        if (ELEMENT == 2) asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"((u16)value) : "memory");
    }
};

// The patches of consecutive blocks, in the order of columns. Each lane holds one of 32 that lie at a multiple of 32 in the list.
struct Patches {
    const u32* list;
    u32 next, end, held;

    // The patches from `first` on, a multiple of 32.
    __device__ __forceinline__ u32 load(u32 first, u32 lane) const {
        u32 patch = 0;
        if (first < end) asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(patch) : "l"(list + min(first + lane, end - 1)));
        return patch;
    }
    __device__ __forceinline__ void begin(const Matrix& m, u32 block, u32 lane) {
        list = m.patches;
        next = end = 0;
        if (m.patch_offsets) next = m.patch_offsets[block], end = m.patch_offsets[block + 1];
        held = load(next & ~31u, lane);
    }
    // Whether this lane's is not yet done.
    __device__ __forceinline__ bool waits(u32 lane) const { return lane >= next % 32 && (next & ~31u) + lane < end; }
    // Calls f(row, column, code) for those below column `stop` that are not yet done, each in one lane.
    template <class F>
    __device__ __forceinline__ void until(u32 stop, u32 lane, F f) {
        while (next < end) {
            const bool now = waits(lane) && held >> 21 < stop;
            if (now) f(held >> 16 & 31, held >> 21, held & 0xffff);
            const u32 done = __ballot_sync(FULL, now);
            next += __popc(done);
            if (next % 32 || !done) break;
            held = load(next, lane);
        }
    }
    // The same for all, 32 by 32: calls f(whether the lane has one, that).
    template <class F>
    __device__ __forceinline__ void all(u32 lane, F f) {
        while (next < end) {
            f(waits(lane), held);
            next = min((next & ~31u) + 32, end);
            if (next % 32 == 0) held = load(next, lane);
        }
    }
};

// A value as 16-bit fixed point, 255 · high + low, as codec/src/product.rs defines it: `high` and `low` are the lowest bytes of these. Rounded by adding numbers from
// 2^23 to 2^24 whose lowest byte is zero, for conversions to integers go to a pipe of an eighth of the speed. The first one, divided by 255, is an integer but for
// 5 · 10^-5; a fixed-point number so divided is at least 2 · 10^-3 from where it would be rounded otherwise, so that one rounding does as well as three.
struct Fixed {
    u32 high, low;
    __device__ __forceinline__ Fixed(float v, float ratio) {
        constexpr float ROUND = 0xfeff00, QUOTIENT = 0xffff, ROUND_HIGH = 0xc00000;
        const float fixed = __fadd_rn(__fmul_rn(v, ratio), ROUND), part = __fmaf_rn(fixed, 1.0f / 255.0f, ROUND_HIGH - QUOTIENT);
        high = __float_as_uint(part);
        low = __float_as_uint(fixed) + high;  // minus 256 · high
    }
};

// By how much activations of which the largest is `most` are multiplied; 0: they are taken as zeros.
__device__ __forceinline__ float fixed_ratio(float most, bool finite) {
    const float ratio = most > 0 ? __fdiv_rn(32512.0f, most) : 0;
    return finite && ratio > 0 && ratio < __int_as_float(0x7f800000) ? ratio : 0;
}
__device__ __forceinline__ double fixed_unit(float ratio, bool finite) {
    return !finite ? __longlong_as_double(0x7ff8000000000000) : ratio > 0 ? 1.0 / (double)ratio : 0.0;
}

// Of their lowest bytes.
__device__ __forceinline__ u32 pack(u32 a, u32 b, u32 c, u32 d) { return prmt(prmt(a, b, 0x0040), prmt(c, d, 0x0040), 0x5410); }
__device__ __forceinline__ u32 pack(float a, float b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *(const u32*)&pair;
}
// What bf16 numbers leave of them.
__device__ __forceinline__ float4 rest(float4 v) {
    auto of = [](float v) { return v - __bfloat162float(__float2bfloat16_rn(v)); };
    return {of(v.x), of(v.y), of(v.z), of(v.w)};
}

__device__ __forceinline__ float element(const void* from, u32 i, bool bf16) {
    return bf16 ? __uint_as_float((u32)((const u16*)from)[i] << 16) : ((const float*)from)[i];
}

// Columns 4i to 4i + 3 of rows that do not begin at multiples of four columns. Not inline: rarely run, and long.
__device__ __noinline__ float4 ragged_quad(const void* from, u32 i, u32 n_cols, bool bf16) {
    auto at = [&](u32 c) { return c < n_cols ? element(from, c, bf16) : 0.0f; };
    return {at(4 * i), at(4 * i + 1), at(4 * i + 2), at(4 * i + 3)};
}

// One token's activations, read by all threads of the block together, times the norm's weight. `held` are those of the first
// columns, so that they need not be read again; of the others TOGETHER quads a thread are on their way at once.
template <u32 TOGETHER>
struct Input {
    static constexpr u32 HELD = 2;
    const void* x;  // f32, or bf16
    const float* norm;
    bool bf16;
    u32 n_cols, n_quads;  // n_quads: up to a multiple of 32 columns
    float4 held[HELD];
    float squares = 0, most = 0;  // `most`: magnitude, or what is no number, whose bits are more than any other's
    const u8* kept = nullptr;     // what keep() copied, and where it ends
    u32 kept_end = 0;

    // Columns of a row that begins at a multiple of four columns, as all do of which there are four.
    static __device__ __forceinline__ float4 whole_quad(const void* from, u32 i, bool bf16) {
        if (!bf16) return ((const float4*)from)[i];
        const uint2 pairs = ((const uint2*)from)[i];
        const float2 low = widen(pairs.x), high = widen(pairs.y);
        return {low.x, low.y, high.x, high.y};
    }
    __device__ __forceinline__ float4 quad(const void* from, u32 i, bool bf16) const {
        if (n_cols % 4) return ragged_quad(from, i, n_cols, bf16);
        return 4 * i < n_cols ? whole_quad(from, i, bf16) : float4{};
    }
    __device__ __forceinline__ float4 values(u32 i) const { return quad(x, i, bf16); }
    __device__ __forceinline__ float4 weights(u32 i) const { return norm ? quad(norm, i, false) : float4{1, 1, 1, 1}; }
    static __device__ __forceinline__ float4 times(float4 v, float4 w) { return {v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w}; }
    __device__ __forceinline__ float4 count(float4 v, float4 w) {
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        v = times(v, w);
        auto at_least = [&](float v) { asm("max.NaN.f32 %0, %0, %1;" : "+f"(most) : "f"(fabsf(v))); };
        at_least(v.x), at_least(v.y), at_least(v.z), at_least(v.w);
        return v;
    }
    // Asks for the first columns. `x` null stands for zeros.
    __device__ __forceinline__ Input(const void* x, const float* norm, bool bf16, u32 n_cols)
        : x(x), norm(norm), bf16(bf16), n_cols(x ? n_cols : 0), n_quads((n_cols + 31) / 32 * 8) {
#pragma unroll
        for (u32 h = 0; h < HELD; h++) {
            const u32 i = threadIdx.x + h * blockDim.x;
            held[h] = i < n_quads ? values(i) : float4{};
        }
    }
    // Asks for as many of the columns that are not held as shared memory has room for, so that they all come at once, and once. A thread reads what it asked for.
    __device__ __forceinline__ void keep(u8* shared, u32 room) {
        const u32 first = HELD * blockDim.x, bytes = bf16 ? 8 : 16, n_whole = n_cols % 4 ? 0 : n_cols / 4;
        kept = shared - first * bytes, kept_end = min(n_whole, first + room / bytes);
        for_kept([&](u32 i, auto bf16) INLINE {
            constexpr u32 BYTES = holds(bf16) ? 8 : 16;
            copy_async<BYTES>((u32)__cvta_generic_to_shared(kept) + i * BYTES, (const u8*)x + i * BYTES);
        });
        commit_copies();
    }
    // Calls f(i, whether they are bf16) for the quads that are kept; returns the thread's first that is not.
    template <class F>
    __device__ __forceinline__ u32 for_kept(F f) const {
        u32 i = threadIdx.x + HELD * blockDim.x;
        if (bf16) for (; i < kept_end; i += blockDim.x) f(i, std::true_type());
        else for (; i < kept_end; i += blockDim.x) f(i, std::false_type());
        return i;
    }
    // Calls f(i, columns 4i to 4i + 3, the norm's weights) for those that are not held.
    template <class F>
    __device__ __forceinline__ void for_further(F f) const {
        u32 first = threadIdx.x + HELD * blockDim.x;
        if (kept) first = for_kept([&](u32 i, auto bf16) INLINE { f(i, whole_quad(kept, i, holds(bf16)), weights(i)); });
        for (; first < n_quads; first += TOGETHER * blockDim.x) {
            float4 v[TOGETHER], w[TOGETHER];
#pragma unroll
            for (u32 t = 0; t < TOGETHER; t++) v[t] = values(first + t * blockDim.x), w[t] = weights(first + t * blockDim.x);
#pragma unroll
            for (u32 t = 0; t < TOGETHER; t++) {
                if (first + t * blockDim.x < n_quads) f(first + t * blockDim.x, v[t], w[t]);
            }
        }
    }
    // Reads all; afterwards `most` is the block's, and with a norm `squares` is.
    __device__ __forceinline__ void read() {
        __shared__ float all_squares[32];
        __shared__ u32 all_most[32];
        float4 w[HELD];
#pragma unroll
        for (u32 h = 0; h < HELD; h++) w[h] = weights(threadIdx.x + h * blockDim.x);
#pragma unroll
        for (u32 h = 0; h < HELD; h++) held[h] = count(held[h], w[h]);
        if (kept) wait_copies<0>();
        for_further([&](u32, float4 v, float4 w) INLINE { count(v, w); });
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const u32 most_bits = __reduce_max_sync(FULL, __float_as_uint(most));
        if (norm) squares = warp_sum(squares);
        if (lane == 0) all_most[warp] = most_bits;
        if (norm && lane == 0) all_squares[warp] = squares;
        __syncthreads();
        const bool holds = lane < blockDim.x / 32;
        most = __uint_as_float(__reduce_max_sync(FULL, holds ? all_most[lane] : 0));
        if (norm) squares = warp_sum(holds ? all_squares[lane] : 0);
    }
    // Calls put as for_each does, in one pass, of what is not yet multiplied by the norm's factor; afterwards, with a norm, `squares` is the block's.
    template <class Put>
    __device__ __forceinline__ void read_once(Put put) {
        float4 w[HELD];
#pragma unroll
        for (u32 h = 0; h < HELD; h++) w[h] = weights(threadIdx.x + h * blockDim.x);
#pragma unroll
        for (u32 h = 0; h < HELD; h++) {
            const u32 i = threadIdx.x + h * blockDim.x;
            if (i < n_quads) put(i, count(held[h], w[h]));
        }
        for_further([&](u32 i, float4 v, float4 w) INLINE { put(i, count(v, w)); });
        if (norm) squares = block_sum(squares);
    }
    __device__ __forceinline__ bool finite() const { return most < __int_as_float(0x7f800000); }
    // What the norm multiplies by.
    __device__ __forceinline__ float factor(float eps) const { return norm ? rsqrtf(squares / n_cols + eps) : 1; }
    // Calls put(i, columns 4i to 4i + 3) for all quads, each in one thread.
    template <class Put>
    __device__ __forceinline__ void for_each(Put put) {
#pragma unroll
        for (u32 h = 0; h < HELD; h++) {
            const u32 i = threadIdx.x + h * blockDim.x;
            if (i < n_quads) put(i, held[h]);
        }
        for_further([&](u32 i, float4 v, float4 w) INLINE { put(i, times(v, w)); });
    }
};

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

// ---------------------------------------------------------------- sinks

// Rows of codes, or of bf16 values, staged so that 256 bytes of a row are stored at once: of 128 memory takes a fifth less.
template <int FORMAT, bool VALUES>
struct DenseSink {
    static constexpr u32 ROW = 256, TILE_BYTES = 32 * ROW;
    static constexpr int ELEMENT = VALUES || FORMAT == BF16 ? 2 : 1, UNIT = 32 * ELEMENT, PER_TILE = ROW / UNIT;
    static constexpr bool MASKS = false;
    static constexpr int WRITES = ELEMENT;  // bytes, for each weight
    static constexpr int LOADS_AFTER = 0;   // eight weights a step: the one after which raw bits are asked for
    const Matrix& m;
    u8* out;
    Tile<ROW> tile;
    Patches patches;
    u32 lane, i, first_col, n_cols;
    float scale;
    u32 held[4];

    __device__ __forceinline__ DenseSink(const Task& task, u32 scratch, u32 lane) : m(task.matrix), out((u8*)task.out), tile{scratch}, lane(lane) {}
    __device__ __forceinline__ void begin_block(u32 i_, u32 j) {
        i = i_, scale = VALUES && i * 32 + lane < m.n_rows ? scale_of<FORMAT>(m, i * 32 + lane) : 0;
        first_col = j * m.block_cols, n_cols = min(m.block_cols, m.n_cols - first_col);
        patches.begin(m, i * m.n_col_blocks + j, lane);
    }
    template <class W>
    __device__ __forceinline__ void quad(u32 u, int q, Quad quad, W) {
        if (VALUES) quad = to_bf16<FORMAT>(quad, scale);
        constexpr int QUADS = 4 / ELEMENT;  // of 16 bytes
        held[q % QUADS * ELEMENT] = quad.a;
        if constexpr (ELEMENT == 2) held[q % QUADS * 2 + 1] = quad.b;
        if (q % QUADS == QUADS - 1) tile.store(again(lane), u % PER_TILE * UNIT + q / QUADS * 16, held[0], held[1], held[2], held[3]);
    }
    __device__ __forceinline__ void end_unit(u32 u) {
        const u32 lane = again(this->lane);
        const bool last = (u + 1) * 32 >= n_cols;
        if (!last && (u + 1) % PER_TILE) return;
        __syncwarp();
        const u32 tile_col = u / PER_TILE * PER_TILE * 32;
        patches.until((u + 1) * 32, lane, [&](u32 row, u32 col, u32 code) {
            u32 element = code;
            if (VALUES && FORMAT != BF16) {
                const __nv_bfloat16 v = __float2bfloat16_rn(value_of<FORMAT>(code) * scale_of<FORMAT>(m, i * 32 + row));
                element = *(const u16*)&v;
            }
            tile.put<ELEMENT>(row, (col - tile_col) * ELEMENT, element);
        });
        __syncwarp();
        const u32 used = min(ROW, (n_cols - tile_col) * ELEMENT), rows = min(32u, m.n_rows - i * 32);
        u8* to = out + ((u64)i * 32 * m.n_cols + first_col + tile_col) * ELEMENT;
        // Not before: what is decoded until here depends on no other kernel.
        wait_for_previous();
        const u64 stride = (u64)m.n_cols * ELEMENT;
        if (stride % 16 == 0) {
            // Two rows at once, then the next; as many loads together as there are registers for.
            constexpr u32 LANES = ROW / 16, AT_ONCE = 32 / LANES, TOGETHER = 4;
            const u32 first = lane / LANES, byte16 = lane % LANES * 16;
#pragma unroll
            for (u32 r = 0; r < 32; r += AT_ONCE * TOGETHER) {
                uint4 v[TOGETHER];
#pragma unroll
                for (u32 n = 0; n < TOGETHER; n++) v[n] = tile.load(first + r + AT_ONCE * n, byte16);
#pragma unroll
                for (u32 n = 0; n < TOGETHER; n++) {
                    const u32 row = first + r + AT_ONCE * n;
                    if (row < rows && byte16 < used) __stcs((uint4*)(to + row * stride + byte16), v[n]);
                }
            }
        } else {
            for (u32 e = lane; e < rows * (ROW / 4); e += 32) {  // four bytes of a row each, element by element
                const u32 row = e / (ROW / 4), at = e % (ROW / 4) * 4;
                u32 word;
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(tile.base + tile.offset(row, at)) : "memory");
                for (u32 b = 0; b < 4 && at + b < used; b += ELEMENT) {
                    if (ELEMENT == 1) to[row * stride + at + b] = word >> (8 * b);
                    if (ELEMENT == 2) *(u16*)(to + row * stride + at + b) = word >> (8 * b);
                }
            }
        }
        __syncwarp();
    }
    __device__ __forceinline__ void end_block() {}
    __device__ __forceinline__ void end_row(u32) {}
};

// One row of the row block, as f32, to a token's place.
template <int FORMAT>
struct GatherSink {
    static constexpr int TILE_BYTES = 0;
    static constexpr bool MASKS = false;
    static constexpr int WRITES = 0, LOADS_AFTER = 0;
    const Matrix& m;
    float* out;  // [n_cols]
    Patches patches;
    u32 lane, i, row, first_col;
    float scale;

    __device__ __forceinline__ void begin_block(u32, u32 j) {
        first_col = j * m.block_cols;
        patches.begin(m, i * m.n_col_blocks + j, lane);
    }
    template <class W>
    __device__ __forceinline__ void quad(u32 u, int q, Quad quad, W) {
        if (lane != row) return;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const u32 col = first_col + u * 32 + q * 4 + c;
            if (col < m.n_cols) out[col] = value_of<FORMAT>(code_at<FORMAT>(quad, c)) * scale;
        }
    }
    __device__ __forceinline__ void end_unit(u32) {}
    __device__ __forceinline__ void end_block() {
        __syncwarp();
        patches.until(~0u, lane, [&](u32 r, u32 col, u32 code) {
            if (r == row) out[first_col + col] = value_of<FORMAT>(code) * scale;
        });
    }
    __device__ __forceinline__ void end_row(u32) {}
};

constexpr u32 GROUP = 128;  // columns

// One 16 × 32-byte operand of mma, of which the lane's 16 bytes are at `at`.
__device__ __forceinline__ void load_matrix(u32 (&v)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void mma(i32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One token. int8: exact, x in two signed bytes (base 255). fp8: float32, four sums a row, one for each column modulo 4. bf16: on the tensor
// cores, x as the sum of two bf16 numbers, float32 sums of GROUP columns, which are added up as doubles: so encoded weights and plain ones make the
// same products, however they are shared out, but for patches. The rows beside one that has a weight which is no number get none either.
//
// There a lane's columns, which are all of its own row, stand where the operand has four rows' (row g = lane / 4, columns of t = lane % 4): so
// the activations are, in column n of the other operand, those of the lanes with t = n % 4 and zeros for the others, and the products of the
// lane's row come out in column t (of its first four columns) and in column t + 4 of row g + 8 (of the next four). GROUPS is 1, or 4 for plain
// weights: then a warp has eight rows, of which the four lanes of a row have four groups of columns.
template <int FORMAT, u32 GROUPS = 1>
struct DotSink {
    static constexpr u32 ROWS = 32 / GROUPS;
    static constexpr bool MASKS = FORMAT != INT8;
    static constexpr int WRITES = 0, LOADS_AFTER = 0;
    const Matrix& m;
    // Shared, the columns four by four. int8: high 4, low 4; fp8: f32; bf16: high 4, low 4. Behind them, what a sum is worth (double), and zeros.
    const u8* x;
    Patches patches;
    u32 scratch, lane, first_col, n_cols;
    i32 high = 0, low = 0;
    float sums[4] = {};
    double total = 0;   // bf16: of the groups before
    u32 slot;           // where the row block's sums go
    u32 paired;
    const u32& first_own;  // shared: of two thread blocks the second one's row blocks before it are the first one's, and their sums go there
    const uint4* x_next;  // the unit's
    uint4 pair;           // int8: of two quads
    Quad even;

    __device__ __forceinline__ DotSink(const Task& task, u32 scratch, u32 slot, u32 paired, const u32& first_own, u32 lane)
        : m(task.matrix), scratch(scratch), lane(lane), slot(slot), paired(paired), first_own(first_own) {}
    // What comes from device memory and depends on no other kernel.
    __device__ __forceinline__ void look_ahead(const Launch& launch) {
        for (u32 c = threadIdx.x * 32; launch.norm && c < m.n_cols; c += blockDim.x * 32) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(launch.norm + c));
        }
    }
    // `shared` has room for the activations. All threads call it.
    template <u32 TOGETHER>
    __device__ __forceinline__ void prepare(const Launch& launch, Input<TOGETHER>& input, u8* shared) {
        x = shared;
        double unit = 1;
        if constexpr (FORMAT == INT8) {
            input.read();
            const float ratio = fixed_ratio(input.most, input.finite());
            input.for_each([&](u32 i, float4 v) {
                const Fixed a(v.x, ratio), b(v.y, ratio), c(v.z, ratio), d(v.w, ratio);
                ((uint2*)shared)[i] = {pack(a.high, b.high, c.high, d.high), pack(a.low, b.low, c.low, d.low)};
            });
            unit = fixed_unit(ratio, input.finite());
        } else {
            input.read_once([&](u32 i, float4 v) {
                const float4 low = rest(v);
                if (FORMAT == BF16) ((uint4*)shared)[place(i)] = {pack(v.x, v.y), pack(v.z, v.w), pack(low.x, low.y), pack(low.z, low.w)};
                else ((float4*)shared)[i] = v;
            });
        }
        unit *= input.factor(launch.eps);
        *(double*)unit_at() = unit;
        if (FORMAT == BF16 && threadIdx.x < 8) ((uint4*)zeros_at())[threadIdx.x] = {};
        for (u32 i = input.n_quads + threadIdx.x; GROUPS > 1 && i < n_quads(); i += blockDim.x) ((uint4*)shared)[place(i)] = {};
    }
    // Of activations with the zeros behind them.
    __device__ __forceinline__ u32 n_quads() const {
        constexpr u32 COLS = GROUPS == 1 ? 32 : GROUPS * GROUP;
        return (m.n_cols + COLS - 1) / COLS * (COLS / 4);
    }
    // Where those of a quad lie: of four groups, which are read at the same time, in different banks.
    static __device__ __forceinline__ u32 place(u32 i) { return GROUPS == 1 ? i : i + i / (GROUP / 4); }
    __device__ __forceinline__ const u8* unit_at() const { return x + place(n_quads()) * (FORMAT == INT8 ? 8 : 16); }
    // bf16: 128 bytes, in other banks than what is read of `x` at the same time.
    __device__ __forceinline__ const u8* zeros_at() const { return unit_at() + 64; }
    __device__ __forceinline__ bool reads_x() const { return lane / 4 % 4 == lane % 4; }
    __device__ __forceinline__ void begin_block(u32 i, u32 j) {
        first_col = j * m.block_cols, n_cols = min(m.block_cols, m.n_cols - first_col);
        x_next = (const uint4*)x + place(first_col / (FORMAT == INT8 ? 8 : 4));
        if (FORMAT == BF16) {
            const u32 group = GROUPS == 1 ? 0 : lane / 4 % 4;
            x_next = reads_x() ? x_next + place(group * (GROUP / 4)) + lane / 16 : (const uint4*)zeros_at();
        }
        patches.begin(m, i * m.n_col_blocks + j, lane);
    }
    template <class W>
    __device__ __forceinline__ void quad(u32 u, int q, Quad quad, W whole) {
        if (MASKS && !holds(whole)) quad = first_columns<FORMAT == BF16 ? 2 : 1>(quad, (i32)n_cols - (i32)(u * 32 + q * 4));
        if constexpr (FORMAT == INT8) {
            if (q % 2 == 0) pair = x_next[q / 2];
            high = __dp4a((i32)quad.a, (i32)(q & 1 ? pair.z : pair.x), high);
            low = __dp4a((i32)quad.a, (i32)(q & 1 ? pair.w : pair.y), low);
        } else if constexpr (FORMAT == BF16) {
            if (q % 2 == 0) {
                even = quad;
            } else {
                const uint4 v = x_next[q / 2 * 2];
                const u32 a[4] = {even.a, quad.a, even.b, quad.b};
                mma(sums, a, v.x, v.y);
                mma(sums, a, v.z, v.w);
            }
        } else {
            const float4 v = ((const float4*)x_next)[u * 8 + q];
            sums[0] = fmaf(value_of<FORMAT>(code_at<FORMAT>(quad, 0)), v.x, sums[0]);
            sums[1] = fmaf(value_of<FORMAT>(code_at<FORMAT>(quad, 1)), v.y, sums[1]);
            sums[2] = fmaf(value_of<FORMAT>(code_at<FORMAT>(quad, 2)), v.z, sums[2]);
            sums[3] = fmaf(value_of<FORMAT>(code_at<FORMAT>(quad, 3)), v.w, sums[3]);
        }
    }
    __device__ __forceinline__ void end_unit(u32 u) {
        if (FORMAT == INT8) x_next += 4;
        if (FORMAT == BF16 && reads_x()) x_next += 8;
        if (FORMAT == BF16 && GROUPS == 1 && (u + 1) % (GROUP / 32) == 0 && (u + 1) * 32 < n_cols) end_group();
    }
    // A unit of plain bf16.
    __device__ __forceinline__ void rows(u32 u, Tile<64> weights) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const uint4 v = weights.load(lane, 16 * c);
            quad(u, 2 * c, {v.x, v.y}, std::true_type()), quad(u, 2 * c + 1, {v.z, v.w}, std::true_type());
        }
        end_unit(u);
    }
    // bf16: adds the sums to their rows' total.
    __device__ __forceinline__ void end_group() {
        // From where the products stand to the lanes of their rows.
        float y[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            y[c] = lane & 2 ? sums[2 + c] : sums[c];
            y[c] += __shfl_xor_sync(FULL, y[c], 2);
            y[c] = __shfl_sync(FULL, y[c], (lane & 28) | lane >> 1 & 1);
        }
        total += lane & 1 ? y[1] : y[0];
        for (int c = 0; c < 4; c++) sums[c] = 0;
    }
    __device__ __forceinline__ void end_block() {
        if (FORMAT == BF16) end_group();
        if (patches.next == patches.end) return;
        if constexpr (FORMAT == INT8) {
            // The sums are exact, so that the order does not matter.
            const u32 at = again(scratch) + 8 * again(lane);
            asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(high), "r"(low) : "memory");
            __syncwarp();
            patches.until(~0u, lane, [&](u32 row, u32 col, u32 code) {
                // With a trellis the upper byte is what stands in the weight's place, and the filler is zero; without one it is the other way round.
                const i32 change = (i32)(signed char)code - ((i32)(signed char)m.filler + (i32)(signed char)(code >> 8));
                const u32 c = first_col + col;
                const signed char* v = (const signed char*)x + c / 4 * 8 + c % 4;
                asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(scratch + 8 * row), "r"(change * v[0]) : "memory");
                asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(scratch + 8 * row + 4), "r"(change * v[4]) : "memory");
            });
            __syncwarp();
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(high), "=r"(low) : "r"(at) : "memory");
            __syncwarp();
        } else {
            // A lane takes one of 32, and hands what it changes to its row's lane, which adds in the patches' order.
            const u32 changes = again(scratch), owners = changes + 128;
            patches.all(lane, [&](bool has, u32 patch) {
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(owners + 4 * lane), "r"(0) : "memory");
                __syncwarp();
                if (has) {
                    const u32 c = first_col + (patch >> 21);
                    float v;
                    if constexpr (FORMAT == BF16) {
                        const __nv_bfloat16* pair = (const __nv_bfloat16*)x + c / 4 * 8 + c % 4;
                        v = __bfloat162float(pair[0]) + __bfloat162float(pair[4]);
                    } else {
                        v = ((const float*)x)[c];
                    }
                    const float change = value_of<FORMAT>(patch & 0xffff) * v - value_of<FORMAT>(m.filler) * v;
                    asm volatile("st.shared.f32 [%0], %1;" ::"r"(changes + 4 * lane), "f"(change) : "memory");
                    asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(owners + 4 * (patch >> 16 & 31)), "r"(1u << lane) : "memory");
                }
                __syncwarp();
                u32 own;
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(own) : "r"(owners + 4 * lane) : "memory");
                for (; own; own &= own - 1) {
                    float change;
                    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(change) : "r"(changes + 4 * (__ffs(own) - 1)) : "memory");
                    total += change;
                }
                __syncwarp();
            });
        }
    }
    __device__ __forceinline__ void end_row(u32 i) {
        typename std::conditional<FORMAT == INT8, i64, double>::type sum;
        if constexpr (FORMAT == INT8) sum = 255 * (i64)high + low;
        else sum = total + ((double)sums[0] + sums[1] + ((double)sums[2] + sums[3]));
        if constexpr (GROUPS == 4) sum += __shfl_xor_sync(FULL, sum, 1), sum += __shfl_xor_sync(FULL, sum, 2);
        const u32 at = slot + 8 * again(lane) / GROUPS;
        if (paired && i < first_own) store_in_first(at, *(u64*)&sum);
        else if (lane % GROUPS == 0) asm volatile("st.shared.u64 [%0], %1;" ::"r"(at), "l"(*(u64*)&sum) : "memory");
        slot += 8 * ROWS, high = low = 0, total = 0;
        for (int c = 0; c < 4; c++) sums[c] = 0;
    }
    // What the sums are worth.
    __device__ __forceinline__ double unit() const { return *(const double*)unit_at(); }
};

#if __CUDA_ARCH__ >= 900
#define WAIT_PARITY "mbarrier.try_wait.parity.shared.b64 over, [%0], %1;"
#else
#define WAIT_PARITY "mbarrier.test_wait.parity.shared.b64 over, [%0], %1;"
#endif

// 2 to 16 tokens, on the tensor cores: some warps decode to tiles in shared memory (TileSink), others multiply those (Multiplier), so that neither needs the
// registers of both. A tile is 32 rows of 64 bytes: one unit of bf16, or two of codes that follow one another in a row block (or one, and zeros). Each decoder
// has STAGES of them, one after the other in a ring, with two barriers each: that it is full, and that it is free.
struct Tiles {
    static constexpr u32 STAGES = 2, TILE = 2048, BYTES = STAGES * TILE, BARRIER_BYTES = 64;
    // Arrivals that end a phase: one lane arrives for its warp, and releases what the others did before __syncwarp. compute-sanitizer's racecheck does not
    // follow that, and gets every lane's.
#ifdef RACECHECK
    static constexpr u32 ARRIVALS = 32;
#else
    static constexpr u32 ARRIVALS = 1;
#endif
    u32 base, barriers;

    static __device__ __forceinline__ void create(u32 barrier) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "n"(ARRIVALS) : "memory");
    }
    // By one thread.
    __device__ __forceinline__ void create() const {
        for (u32 s = 0; s < 2 * STAGES; s++) create(barriers + 8 * s);
    }
    // The decoder's `t`th.
    __device__ __forceinline__ Tile<64> tile(u32 t) const { return {base + t % STAGES * TILE}; }
    __device__ __forceinline__ u32 full(u32 t) const { return barriers + t % STAGES * 16; }
    __device__ __forceinline__ u32 free(u32 t) const { return full(t) + 8; }
    // Until the phase of this parity is over. The one before it has to be.
    static __device__ __forceinline__ void wait(u32 barrier, u32 parity) {
        asm volatile(
            "{.reg .pred over;"
            "again: " WAIT_PARITY
            "@over bra done;"
            "nanosleep.u32 32;"
            "bra again;"
            "done: }" ::"r"(barrier), "r"(parity) : "memory");
        __syncwarp();
    }
    __device__ __forceinline__ void wait_full(u32 t) const { wait(full(t), t / STAGES & 1); }
    __device__ __forceinline__ void wait_free(u32 t) const { wait(free(t), (t / STAGES & 1) ^ 1); }
    // By all lanes, what they did before is done.
    static __device__ __forceinline__ void arrive(u32 barrier) {
        __syncwarp();
        if (threadIdx.x % 32 < ARRIVALS) asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(barrier) : "memory");
    }
};

// Several tokens: a slot has the sums of 32 rows for each, and room for two more, so that those of different tokens lie in different banks.
constexpr u32 TOKEN_ROWS = 32 + 2;

// Leaves what mma has added up in a slot: sum_of(half of the rows, eight tokens, 0 to 3).
template <int EIGHTS, class F>
__device__ __forceinline__ void put_sums(u32 slot, u32 n_tokens, F sum_of) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const u32 row = 16 * half + 8 * (s / 2) + lane / 4, token = 8 * n + lane % 4 * 2 + s % 2;
                if (token >= n_tokens) continue;
                asm volatile("st.shared.u64 [%0], %1;" ::"r"(slot + (token * TOKEN_ROWS + row) * 8), "l"(sum_of(half, n, s)) : "memory");
            }
        }
    }
}

template <int FORMAT>
struct TileSink {
    static constexpr int ELEMENT = FORMAT == INT8 ? 1 : 2;
    static constexpr bool MASKS = FORMAT != INT8;
    static constexpr int WRITES = 0, LOADS_AFTER = 1;
    const Matrix& m;
    Tiles tiles;
    Patches patches;
    u32 begun;       // barriers, one for each row block: that the decoder which is in the one before it has come to it
    u32 lane, n_cols, t = 0;
    u32 second = 0;  // 32 where the tile has a unit already
    u32 held[4];

    __device__ __forceinline__ TileSink(const Matrix& m, Tiles tiles, u32 begun, u32 lane) : m(m), tiles(tiles), begun(begun), lane(lane) {}
    __device__ __forceinline__ void begin_block(u32 i, u32 j) {
        if (j == 0 && t > 0) Tiles::arrive(begun + 8 * i);
        n_cols = min(m.block_cols, m.n_cols - j * m.block_cols);
        patches.begin(m, i * m.n_col_blocks + j, lane);
    }
    template <class W>
    __device__ __forceinline__ void quad(u32 u, int q, Quad quad, W whole) {
        if (FORMAT == FP8) quad = to_bf16<FP8>(quad, 1);
        if (MASKS && !holds(whole)) quad = first_columns<2>(quad, (i32)n_cols - (i32)(u * 32 + q * 4));
        constexpr int QUADS = 4 / ELEMENT;  // of 16 bytes
        held[q % QUADS * ELEMENT] = quad.a;
        if constexpr (ELEMENT == 2) held[q % QUADS * 2 + 1] = quad.b;
        if (q % QUADS < QUADS - 1) return;
        if (q == QUADS - 1 && second == 0) tiles.wait_free(t);
        tiles.tile(t).store(lane, second + q / QUADS * 16, held[0], held[1], held[2], held[3]);
    }
    __device__ __forceinline__ void end_unit(u32 u) {
        if (patches.next < patches.end) {
            __syncwarp();
            patches.until((u + 1) * 32, lane, [&](u32 row, u32 col, u32 code) {
                u32 element = code;
                if (FORMAT == FP8) {
                    const __nv_bfloat16 v = __float2bfloat16_rn(value_of<FP8>(code));
                    element = *(const u16*)&v;
                }
                tiles.tile(t).template put<ELEMENT>(row, second + (col - u * 32) * ELEMENT, element);
            });
        }
        if (FORMAT == INT8) second ^= 32;
        if (second == 0) end_tile();
    }
    __device__ __forceinline__ void end_tile() {
        Tiles::arrive(tiles.full(t));
        t++, second = 0;
    }
    __device__ __forceinline__ void end_block() {}
    __device__ __forceinline__ void end_row(u32) {
        if (second == 0) return;
        for (u32 c = 0; c < 32; c += 16) tiles.tile(t).store(lane, second + c, 0, 0, 0, 0);
        end_tile();
    }
};

// A warp that multiplies tiles of one row block, which several decoders have, with EIGHTS × 8 tokens. int8: exact. Others: bf16 operands, x as the sum
// of two, sums in float32, of tiles in an order that is always the same: that in which decoders as fast as each other would be through with them.
template <int FORMAT, int EIGHTS>
struct Multiplier {
    static constexpr u32 UNITS = FORMAT == INT8 ? 2 : 1;  // of a tile
    static constexpr u32 STAGES = 3, X_BYTES = 1024 * EIGHTS, BYTES = STAGES * X_BYTES;
    using Sum = typename std::conditional<FORMAT == INT8, i32, float>::type;
    // [half of the rows][tokens][high, low: int8 only]
    Sum sums[2][EIGHTS][FORMAT == INT8 ? 2 : 1][4] = {};

    static __device__ __forceinline__ u32 n_tiles(u32 units) { return (units + UNITS - 1) / UNITS; }

    // The tiles of row block r of the part from every `stride`th decoder from `first` on; `tiles` are those of decoder 0, of the others as far apart as WINDOW,
    // and `begun` is the row block's barrier. `xs`: room for what is multiplied by.
    template <u32 WINDOW>
    __device__ __forceinline__ void run(const Matrix& m, const Part& part, u32 r, u32 first, u32 stride, Tiles tiles, u32 begun, const void* x, u32 xs) {
        const u32 lane = threadIdx.x % 32;
        first = uniform(first), stride = uniform(stride), begun = uniform(begun), tiles.barriers = uniform(tiles.barriers), tiles.base = uniform(tiles.base);
        // Of the decoder that is this lane's: its tiles that are the row block's, and what makes of one its first unit in the row.
        u32 begin = 0, n = 0, unit = 0;
        {
            const u32 decoder = first + stride * lane, row_begin = r * m.n_col_blocks;
            const u32 share_begin = part.warps.begin(decoder), from = max(share_begin, row_begin), to = min(part.warps.begin(decoder + 1), row_begin + m.n_col_blocks);
            if (from < to) {
                const u32 first_unit = units_of(m, 0, from - row_begin);
                if (share_begin < row_begin) {
                    const u32 row = m.rows_in(share_begin);
                    begin = n_tiles(m.n_units - units_of(m, 0, share_begin - row * m.n_col_blocks)) + (r - row - 1) * n_tiles(m.n_units);
                }
                n = n_tiles(units_of(m, 0, to - row_begin) - first_unit), unit = first_unit - begin * UNITS;
            }
        }
        // Tiles, one of each decoder that has a `t`th, then the next of each; as t · 256 + decoder.
        constexpr u32 NONE = ~0u;
        const u32 last = __reduce_max_sync(FULL, begin + n);
        // The first one of the decoder that was in another row block before, of which there is one at most.
        const u32 crossing = __reduce_min_sync(FULL, begin > 0 ? begin << 8 | (first + stride * lane) : NONE);
        u32 t = __reduce_min_sync(FULL, n > 0 ? begin : NONE) - 1, lanes = 0, to_stage = 0, stage = 0;
        xs += lane * 16;
        const u8* source = (const u8*)x + lane * 16;
        // Asks for what the next one is multiplied by.
        auto fetch = [&]() INLINE {
            u32 tile = NONE;
            while (!lanes && ++t < last) lanes = __ballot_sync(FULL, t - begin < n);
            if (lanes) {
                const u32 l = __ffs(lanes) - 1;
                lanes &= lanes - 1;
                tile = t << 8 | (first + stride * l);
                const u8* from = source + (u64)(__shfl_sync(FULL, unit, l) + t * UNITS) * (X_BYTES / UNITS);
#pragma unroll
                for (int c = 0; c < 2 * EIGHTS; c++) copy_async(xs + to_stage + c * 512, from + c * 512);
            }
            commit_copies();
            to_stage = to_stage == BYTES - X_BYTES ? 0 : to_stage + X_BYTES;
            return tile;
        };
        u32 now = fetch(), next = fetch();
#pragma unroll 1
        while (now != NONE) {
            wait_copies<STAGES - 2>();
            __syncwarp();  // after it all lanes are through with the stage before this, too
            const u32 decoder = now & 0xff, t = now >> 8;
            const Tiles its{0, tiles.barriers + decoder * Tiles::BARRIER_BYTES};
            // Until it has come to this row block, the parity of its barriers may be that of two phases before.
            if (now == crossing) Tiles::wait(begun, 0);
            now = next, next = fetch();
            its.wait_full(t);
            // Tiles begin at multiples of 64.
            const u32 at = tiles.base + decoder * WINDOW + t % Tiles::STAGES * Tiles::TILE + Tile<64>::offset(lane & 15, lane & 16);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                u32 a[2][4];
#pragma unroll
                for (int half = 0; half < 2; half++) load_matrix(a[half], (at ^ 32 * k) + 1024 * half);
                if (k == 1) Tiles::arrive(its.free(t));
#pragma unroll
                for (int n = 0; n < EIGHTS; n++) {
                    uint4 b;
                    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(b.x), "=r"(b.y), "=r"(b.z), "=r"(b.w) : "r"(xs + stage + (k * EIGHTS + n) * 512) : "memory");
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        mma(sums[half][n][0], a[half], b.x, b.y);
                        mma(sums[half][n][FORMAT == INT8], a[half], b.z, b.w);
                    }
                }
            }
            stage = stage == BYTES - X_BYTES ? 0 : stage + X_BYTES;
        }
        wait_copies<0>();
    }
    // Leaves the sums in a slot.
    __device__ __forceinline__ void put(u32 slot, u32 n_tokens) const {
        put_sums<EIGHTS>(slot, n_tokens, [&](int half, int n, int s) INLINE {
            if constexpr (FORMAT == INT8) return (u64)(255 * (i64)sums[half][n][0][s] + sums[half][n][1][s]);
            else return (u64)__double_as_longlong(sums[half][n][0][s]);
        });
    }
};

// Where a warp has one block of codes, and decodes all of it before the activations are known: a tile for each unit, one behind the other. They end where the
// block's parts and raw bits stand (see decode_parts), which are read before a tile comes to lie on them.
struct BlockSink {
    static constexpr u32 TILE = 1024;
    Patches patches;
    u32 tiles, lane;
    u32 held[4];

    __device__ __forceinline__ BlockSink(const Matrix& m, u32 block, u32 tiles, u32 lane) : tiles(tiles), lane(lane) { patches.begin(m, block, lane); }
    template <class W>
    __device__ __forceinline__ void quad(u32 u, int q, Quad quad, W) {
        held[q % 4] = quad.a;
        if (q == 3) __syncwarp();  // all lanes have read what the unit is made of
        if (q % 4 == 3) Tile<32>{tiles + u * TILE}.store(lane, q / 4 * 16, held[0], held[1], held[2], held[3]);
    }
    __device__ __forceinline__ void end_unit(u32 u) {
        if (patches.next == patches.end) return;
        __syncwarp();
        patches.until((u + 1) * 32, lane, [&](u32 row, u32 col, u32 code) { Tile<32>{tiles + u * TILE}.put<1>(row, col - u * 32, code); });
    }
};

// What a block's units from FIRST on are multiplied with, for eight tokens: BYTES behind `x`, units STRIDE apart; zeros for those that the block does not have. Each
// load is one piece of assembly: C++ would keep an address for each in registers.
template <u32 FIRST, u32 STRIDE, u32 BYTES>
__device__ __forceinline__ void load_operand(uint4 (&b)[BLOCK_UNITS], const uint4* x, u32 units) {
    if constexpr (FIRST < BLOCK_UNITS) {
        asm volatile(
            "{.reg .pred has; setp.lt.u32 has, %6, %5;"
            "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
            "@has ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4 + %7];}"
            : "=r"(b[FIRST].x), "=r"(b[FIRST].y), "=r"(b[FIRST].z), "=r"(b[FIRST].w)
            : "l"(x), "r"(units), "n"(FIRST), "n"(FIRST * STRIDE + BYTES)
            : "memory");
        load_operand<FIRST + 1, STRIDE, BYTES>(b, x, units);
    }
}

// Adds the products of a tile, of which the lane's 16 bytes of the first 16 rows are at `at`, with eight tokens.
__device__ __forceinline__ void multiply_tile(i32 (&high)[2][4], i32 (&low)[2][4], u32 at, uint4 b) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 a[4];
        load_matrix(a, at + half * (BlockSink::TILE / 2));
        mma(high[half], a, b.x, b.y);
        mma(low[half], a, b.z, b.w);
    }
}

// The products of a block in `units` tiles with EIGHTS × 8 tokens, of which `x` has the lane's part of the block's first unit. Exact: leaves them in a slot, which
// may lie where the tiles do. What stands behind the block's tiles is read, too, and counts nothing.
template <int EIGHTS>
__device__ __forceinline__ void multiply_block(u32 tiles, u32 units, const uint4* x, u32 slot, u32 n_tokens) {
    const u32 lane = threadIdx.x % 32, at = tiles + Tile<32>::offset(lane & 15, lane & 16);
    i32 sums[2][EIGHTS][4];
    uint4 b[BLOCK_UNITS];
    load_operand<0, EIGHTS * 512, 0>(b, x, units);
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
        i32 high[2][4] = {}, low[2][4] = {};
#pragma unroll
        for (u32 u = 0; u < BLOCK_UNITS; u++) multiply_tile(high, low, at + u * BlockSink::TILE, b[u]);
        if (EIGHTS > 1 && n == 0) load_operand<0, EIGHTS * 512, 512>(b, x, units);
#pragma unroll
        for (int s = 0; s < 4; s++) {
#pragma unroll
            for (int half = 0; half < 2; half++) sums[half][n][s] = 255 * high[half][s] + low[half][s];
        }
    }
    __syncwarp();
    put_sums<EIGHTS>(slot, n_tokens, [&](int half, int n, int s) INLINE { return (u64)(i64)sums[half][n][s]; });
}

// The same with one token, whose activations DotSink has prepared in shared memory: `x` are the block's first.
__device__ __forceinline__ void multiply_block(u32 tiles, u32 units, const uint2* x, u32 slot) {
    const u32 lane = threadIdx.x % 32, at = tiles + Tile<32>::offset(lane & 15, lane & 16);
    i32 high[2][4] = {}, low[2][4] = {};
#pragma unroll
    for (u32 u = 0; u < BLOCK_UNITS; u++) {
        uint2 first = {}, second = {};
        if (lane < 4 && u < units) first = x[u * 8 + lane], second = x[u * 8 + 4 + lane];
        multiply_tile(high, low, at + u * BlockSink::TILE, {first.x, second.x, first.y, second.y});
    }
    __syncwarp();
    put_sums<1>(slot, 1, [&](int half, int, int s) INLINE { return (u64)(i64)(255 * high[half][s] + low[half][s]); });
}

// A warp's way through consecutive blocks of a plain matrix: bf16, with rows up to a multiple of eight and columns up to one, at `Matrix::stream`. A block is
// eight rows of four groups of GROUP columns; a unit has 32 columns of each group. They lie in shared memory as the rows of a tile, the groups of a row side
// by side, and STAGES of them are there or on their way, a group of copies each. Columns that the matrix does not have are zeros.
struct PlainReader {
    static constexpr u32 STAGES = 4, UNIT_BYTES = 2048, BYTES = STAGES * UNIT_BYTES;
    // What is asked for next: of four rows of the tile, two of the matrix apart, the lane's 16 bytes.
    const u8* from;
    u32 octet, octets;              // the place of these in their row, and what a row has
    u32 i, j, units, blocks;        // so many units of the first of so many blocks
    u32 base, first, waiting;       // the unit that is multiplied next, and how many are there or on their way

    static __device__ __forceinline__ u32 units_in(const Matrix& m, u32 j) { return min(GROUP / 32, m.n_units - j * (GROUP / 8)); }
    __device__ __forceinline__ void seek(const Matrix& m) {
        const u32 lane = threadIdx.x % 32;
        octet = (j * 4 + lane / 4 % 4) * (GROUP / 8) + lane % 4;
        from = m.stream + ((u64)(i * 8 + lane / 16) * octets + octet) * 16;
        units = units_in(m, j);
    }
    // Asks for the first units of `n_blocks` blocks from column block j_ of row block i_ on.
    __device__ __forceinline__ void open(const Matrix& m, u32 i_, u32 j_, u32 n_blocks, u32 window) {
        octets = (m.n_cols + 7) / 8;
        i = i_, j = j_, blocks = n_blocks, base = window, first = waiting = 0;
        seek(m);
        fill(m);
    }
    // Asks for as many units as there is room for.
    __device__ __forceinline__ void fill(const Matrix& m) {
        while (waiting < STAGES && blocks) {
            const u32 lane = threadIdx.x % 32;
            const u32 to = base + (first + waiting) % STAGES * UNIT_BYTES + Tile<64>::offset(lane / 4, lane % 4 * 16);
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                             ::"r"(to + c * 512), "l"(from + c * (octets * 32)), "r"(octet < octets ? 16 : 0) : "memory");
            }
            commit_copies();
            waiting++, octet += 4, from += 64;
            if (--units == 0) {
                if (++j == m.n_col_blocks) j = 0, i++;
                if (--blocks) seek(m);
            }
        }
    }
    // Hands the blocks to the sink: see decode_blocks.
    template <class Sink>
    __device__ __forceinline__ void read(const Matrix& m, u32 i, u32 j, u32 n_blocks, Sink& sink) {
#pragma unroll 1
        for (;;) {
            const u32 units = units_in(m, j);
            sink.begin_block(i, j);
#pragma unroll 1
            for (u32 u = 0; u < units; u++) {
                if (waiting == STAGES) wait_copies<STAGES - 1>();
                else if (waiting == STAGES - 1) wait_copies<STAGES - 2>();
                else wait_copies<0>();
                __syncwarp();
                sink.rows(u, Tile<64>{base + first * UNIT_BYTES});
                __syncwarp();
                first = (first + 1) % STAGES, waiting--;
                fill(m);
            }
            sink.end_block();
            const bool ends = ++j == m.n_col_blocks;
            if (ends) j = 0, i++;
            if (--n_blocks == 0) break;
            if (ends) sink.end_row(i - 1);
        }
        sink.end_row(i - (j == 0));
    }
};

// ---------------------------------------------------------------- kernels

extern __shared__ __align__(1024) u8 shared_memory[];

__device__ __forceinline__ const Task& find_task(const Launch& launch) {
    u32 t = 0;
    while (t + 1 < launch.n_tasks && blockIdx.x >= launch.tasks[t + 1].first_cta) t++;
    return launch.tasks[t];
}

// Waits for this thread's part of copy_table; `opened`: whether a reader was opened since.
__device__ __forceinline__ void wait_for_table(bool opened) {
    if (opened) wait_copies<4>();
    else wait_copies<0>();
}

// A warp's place among those that share blocks out. Where some get a block more than others, the larger shares come every so many places; so those of
// one scheduler (every fourth warp's) follow one another, or it would get them all.
__device__ __forceinline__ u32 place_of_warp(u32 warp, u32 n_warps) { return n_warps % 4 ? warp : warp % 4 * (n_warps / 4) + warp / 4; }

// Every warp decodes its share of a matrix's blocks, one behind the other.
template <int FORMAT, class Sink, class With>
__device__ __forceinline__ void decode_shares(const Launch& launch, With with) {
    const Task& task = find_task(launch);
    const Matrix& m = task.matrix;
    const u32 lane = threadIdx.x % 32, n_warps = blockDim.x / 32, n_shares = task.n_ctas * n_warps;
    const u32 warp = uniform(threadIdx.x / 32), share = (blockIdx.x - task.first_cta) * n_warps + place_of_warp(warp, n_warps);
    const u64 n_blocks = (m.n_rows + 31) / 32 * m.n_col_blocks;
    const u32 first = uniform(n_blocks * share / n_shares), end = uniform(n_blocks * (share + 1) / n_shares);
    const u32 table = (u32)__cvta_generic_to_shared(shared_memory);
    using RowsReader = Reader<3>;
    const u32 ring = table + launch.table_bytes + warp * (RowsReader::BYTES + Sink::TILE_BYTES);
    const Stream stream(m, first, end);
    copy_table(m, table, threadIdx.x, blockDim.x);
    const u32 i = first / m.n_col_blocks, j = first - i * m.n_col_blocks;
    RowsReader reader;
    if (first < end) {
        reader.open(m, stream, ring, lane);
        prefetch_raw(m, i, j, lane, launch.raw_words);
    }
    start_next();
    wait_for_table(first < end);
    __syncthreads();
    if (first == end) return;
    Sink sink(task, ring + RowsReader::BYTES, lane);
    with(task.codec, [&](auto codec) INLINE { decode_blocks<FORMAT, decltype(codec)>(m, reader, table, lane, i, j, end - first, units_of(m, j, end - first), sink); });
}

// The blocks of a warp: so many from column block j of row block i on, and the slot for the sums of the first of its row blocks. Warp w leaves those of the
// thread block's row block r in slot w + r: a warp's follow one another, and no two meet.
struct Share {
    u32 i, j, n_blocks, slot;

    __device__ __forceinline__ Share(const Task& task, u32 warp, u32 n_warps = 0, u32 paired = 0) {
        const Part part(task, n_warps, paired);
        const u32 second = is_second(paired), first = part.warps.begin(warp) + second * part.half, r = task.matrix.rows_in(first);
        i = part.first_row + r, j = first - r * task.matrix.n_col_blocks, slot = second * part.n_warps + warp + r;
        n_blocks = part.warps.each + (warp < part.warps.more);
    }
};

// Of a task's row blocks that a thread block adds up, the slots with the sums of each.
struct Cut {
    u32 first_row, n_rows;
    u16 slots[MAX_ROWS][2];  // the first and the last

    // By one warp; `slots_of(r, ...)` sets those of the part's row block r. Of paired thread blocks the first one adds up what it has blocks of.
    template <class F>
    __device__ __forceinline__ void work_out(const Matrix& m, const Part& part, u32 paired, u32 lane, F slots_of) {
        const u32 of_first = paired ? m.rows_in(part.half + m.n_col_blocks - 1) : part.n_rows;
        const u32 begin = is_second(paired) ? of_first : 0, end = is_second(paired) ? part.n_rows : of_first;
        if (lane == 0) first_row = part.first_row + begin, n_rows = end - begin;
        for (u32 r = begin + lane; r < end; r += 32) slots_of(r, slots[r - begin]);
    }
};

// Adds what `n` slots hold, from this address on.
template <int FORMAT, class Sum>
__device__ __forceinline__ void add_slots(Sum& sum, u32 slots, u32 n, u32 slot_bytes) {
#pragma unroll 4
    for (u32 s = 0; s < n; s++) {
        u64 bits;
        asm volatile("ld.shared.u64 %0, [%1];" : "=l"(bits) : "r"(slots + s * slot_bytes));
        if constexpr (FORMAT == INT8) sum += (i64)bits;
        else sum += __longlong_as_double((i64)bits);
    }
}

// Lane's row, which is `row`, of the cut's row block r of the product with a token: the sums of the warps that share it, in their order, times what they
// are worth, and the bias.
template <int FORMAT, u32 ROWS, u32 SLOT>
__device__ __forceinline__ float add_up(const Launch& launch, const Task& task, const Cut& cut, u32 slots, u32 r, u32 token, u32 n_tokens, u32 row, float scale, double unit) {
    const u32 lane = threadIdx.x % ROWS, n = cut.slots[r][1] + 1 - cut.slots[r][0];
    typename std::conditional<FORMAT == INT8, i64, double>::type sum = 0;
    slots += ((cut.slots[r][0] * n_tokens + token) * SLOT + lane) * 8;
    add_slots<FORMAT>(sum, slots, n, n_tokens * (SLOT * 8));
    const float y = (float)((double)sum * ((double)scale * unit));
    return task.bias && row < task.matrix.n_rows ? y + element(task.bias, row, launch.bf16) : y;
}

// The end of products: once all warps have left their sums in the slots, at `slots` (those of a second, gated product `slots_bytes` behind), the row blocks
// and tokens are shared out anew. unit_of(token): what a token's sums are worth. All threads call it.
template <int FORMAT, u32 ROWS, bool ONE, class Unit>
__device__ __forceinline__ void put_out(const Launch& launch, const Task& task, const Cut (&cuts)[2], u32 slots, u32 slots_bytes, u32 paired, Unit unit_of) {
    constexpr u32 SLOT = ONE ? ROWS : TOKEN_ROWS;
    const u32 lane = threadIdx.x % ROWS;
    const Task& task0 = launch.gated ? launch.tasks[0] : task;
    const Task& task1 = launch.tasks[1];
    const u32 n_tokens = ONE ? 1 : launch.n_tokens, n_items = cuts[0].n_rows * n_tokens, n_rows = task0.matrix.n_rows;
    u32 item = threadIdx.x / ROWS;
    auto row_of = [&]() INLINE { return (cuts[0].first_row + item / n_tokens) * ROWS + lane; };
    auto scale = [&](const Task& of) INLINE { return item < n_items && row_of() < n_rows ? scale_of<FORMAT>(of.matrix, row_of()) : 0; };
    auto place = [&]() INLINE { return (u64)(item % n_tokens) * n_rows + row_of(); };
    auto added = [&]() INLINE { return task0.adds && item < n_items && row_of() < n_rows ? ((const float*)task0.out)[place()] : -0.0f; };
    // What the sums are worth, and what they are added to, is asked for before they are there.
    float scale0 = scale(task0), scale1 = launch.gated ? scale(task1) : 0, sum = added();
    double unit = ONE ? 0 : unit_of(item % n_tokens);
    if (paired) arrive_cluster(), wait_cluster();
    __syncthreads();
    while (item < n_items) {
        const u32 r = item / n_tokens, token = item % n_tokens, row = row_of();
        if (ONE) unit = unit_of(token);
        float y = add_up<FORMAT, ROWS, SLOT>(launch, task0, cuts[0], slots, r, token, n_tokens, row, scale0, unit);
        if (launch.gated) y = add_up<FORMAT, ROWS, SLOT>(launch, task1, cuts[1], slots + slots_bytes, r, token, n_tokens, row, scale1, unit) * (y / (1 + expf(-y)));
        if (row < n_rows) {
            if (launch.bf16) ((__nv_bfloat16*)task0.out)[place()] = __float2bfloat16_rn(y);
            else ((float*)task0.out)[place()] = sum + y;
        }
        item += blockDim.x / ROWS;
        scale0 = scale(task0), scale1 = launch.gated ? scale(task1) : 0, sum = added();
        if (!ONE) unit = unit_of(item % n_tokens);
    }
}

// Products with one token: a thread block (or two, if paired) has whole row blocks, of which the warps take shares that are as even as can be, and adds up what
// they leave. `with` is with_codec or its like. Shared memory: the table (two with `gated`, where half of the warps are each product's), the warps' rings and
// scratch, slots of sums, and what the sink keeps.
enum Way {
    ENCODED,
    EARLY,  // no warp has more than one block, of which as much is decoded before the activations are known as does not depend on them
    PLAIN,  // the matrices are not encoded, and `with` is nothing
};
template <int FORMAT, Way WAY = ENCODED, class With>
__device__ __forceinline__ void multiply(const Launch& launch, With with) {
    // At once where most is done before the wait, so that it lies beside what other kernels wait for. Elsewhere that gains nothing, and thread blocks of the
    // kernels on the way gather on few multiprocessors, as they do where this one has several on some (not `eager`).
    if (WAY == PLAIN || WAY == EARLY && launch.eager) start_next();
    using Sink = DotSink<FORMAT, WAY == PLAIN ? 4 : 1>;
    constexpr u32 ROWS = Sink::ROWS;
    const u32 window = WAY == PLAIN ? PlainReader::BYTES : WAY == EARLY ? launch.window : RING_BYTES + SCRATCH_BYTES;
    const u32 lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), n_warps = blockDim.x / 32;
    const u32 team_warps = launch.gated ? n_warps / 2 : n_warps, team = warp / team_warps, n_teams = launch.gated ? 2 : 1;
    const Task& task = launch.gated ? launch.tasks[team] : find_task(launch);
    const Matrix& m = task.matrix;
    const u32 team_warp = warp - team * team_warps, paired = WAY == ENCODED ? launch.paired : 0;
    const u32 shared = (u32)__cvta_generic_to_shared(shared_memory), table = shared + team * launch.table_bytes;
    const u32 ring = shared + n_teams * launch.table_bytes + warp * window, scratch = ring + RING_BYTES;
    const u32 slots_at = n_teams * launch.table_bytes + n_warps * window;
    constexpr u32 slot_bytes = ROWS * 8;
    const u32 slots_bytes = launch.n_slots * slot_bytes;
    // What depends on no other kernel: the table, and the first blocks' bytes.
    __shared__ Cut cuts[2];
    // Before one writes into the other's shared memory, that has to be there.
    if (paired) arrive_cluster();
    const Share share(task, team_warp, team_warps, paired);
    const u32 i = share.i, j = share.j, n_blocks = share.n_blocks, block = i * m.n_col_blocks + j;
    typename std::conditional<WAY == PLAIN, PlainReader, ProductReader>::type reader;
    Stream stream;
    if constexpr (WAY == PLAIN) {
        if (n_blocks) reader.open(m, i, j, n_blocks, ring);
    } else {
        stream = Stream(m, block, block + n_blocks);
        copy_table(m, table, threadIdx.x - team * team_warps * 32, team_warps * 32);
        if (n_blocks) {
            reader.open(m, stream, ring, lane);
            prefetch_raw(m, i, j, lane, launch.raw_words);
            if (lane == 0) prefetch_scales(m, i);  // needed at the end
        }
    }
    if (team_warp == 0) {
        const Part part(task, team_warps, paired);
        cuts[team].work_out(m, part, paired, lane, [&](u32 r, u16 (&slots)[2]) INLINE {
            slots[0] = part.owner(r * m.n_col_blocks) + r, slots[1] = part.owner((r + 1) * m.n_col_blocks - 1) + r;
        });
    }
    Sink sink(task, scratch, shared + slots_at + team * slots_bytes + share.slot * slot_bytes, paired, cuts[team].first_row, lane);
    sink.look_ahead(launch);
    // While the kernel before this one is at work.
    if constexpr (WAY == EARLY) {
        wait_for_table(n_blocks);
        __syncthreads();
        if (n_blocks) decode_parts(m, reader, table, lane, i, j, units_of(m, j, n_blocks), scratch);
        if (!launch.eager) start_next();
    }
    wait_for_previous();
    if (WAY == ENCODED) start_next();
    Input<WAY == PLAIN ? 2 : 1> input(launch.x, launch.norm, launch.bf16, m.n_cols);
    sink.prepare(launch, input, shared_memory + slots_at + n_teams * slots_bytes);
    if constexpr (WAY == ENCODED) wait_for_table(n_blocks);
    if (paired) wait_cluster();
    __syncthreads();
    if constexpr (WAY == PLAIN) {
        if (n_blocks) reader.read(m, i, j, n_blocks, sink);
    } else if (n_blocks) {
        with(task.codec, [&](auto codec) INLINE {
            if constexpr (WAY == EARLY) {
                sink.begin_block(i, j);
                finish_parts<decltype(codec)>(m, lane, i, j, units_of(m, j, n_blocks), scratch, ring, sink);
                sink.end_block();
                sink.end_row(i);
            } else {
                decode_blocks<FORMAT, decltype(codec)>(m, reader, table, lane, i, j, n_blocks, units_of(m, j, n_blocks), sink);
            }
        });
    }
    put_out<FORMAT, ROWS, true>(launch, task, cuts, shared + slots_at, slots_bytes, paired, [&](u32) INLINE { return sink.unit(); });
}

// Products with 2 to 16 tokens: the first `n_decoders` warps decode, their blocks shared out as for one token, and the others multiply. What is decoded depends
// on no activations, so that it begins while those are made. Shared memory: the table (two with `gated`), barriers, the decoders' rings and tiles, and the
// multipliers' activations; when all is multiplied, slots of sums in the place of rings and tiles.
template <int FORMAT, int EIGHTS, class With>
__device__ __forceinline__ void multiply_many(const Launch& launch, With with) {
    constexpr u32 WINDOW = RING_BYTES + Tiles::BYTES, BARRIERS = Tiles::BARRIER_BYTES, ROWS_BYTES = 64;
    const u32 lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
    const u32 n_teams = launch.gated ? 2 : 1, n_decoders = launch.n_decoders, team_decoders = n_decoders / n_teams;
    const u32 n_multipliers = (blockDim.x / 32 - n_decoders) / n_teams;  // of a team
    const bool decodes = warp < n_decoders;
    const u32 team = decodes ? warp / team_decoders : (warp - n_decoders) / n_multipliers;
    const u32 place = decodes ? warp - team * team_decoders : warp - n_decoders - team * n_multipliers;
    const Task& task = launch.gated ? launch.tasks[team] : find_task(launch);
    const Matrix& m = task.matrix;
    const u32 shared = (u32)__cvta_generic_to_shared(shared_memory), table = shared + team * launch.table_bytes;
    // A barrier for each row block, of which a team has no more than multipliers.
    const u32 begun = shared + n_teams * launch.table_bytes + team * n_multipliers * 8, barriers = shared + n_teams * launch.table_bytes + ROWS_BYTES;
    const u32 windows = barriers + n_decoders * BARRIERS, xs = windows + n_decoders * WINDOW;
    const u32 slot_bytes = launch.n_tokens * TOKEN_ROWS * 8, slots_bytes = n_multipliers * slot_bytes;
    __shared__ Cut cuts[2];
    if (decodes) {
        const Share share(task, place);
        const u32 i = share.i, j = share.j, n_blocks = share.n_blocks, block = i * m.n_col_blocks + j;
        const u32 ring = windows + warp * WINDOW;
        const Tiles tiles{ring + RING_BYTES, barriers + warp * BARRIERS};
        const Stream stream(m, block, block + n_blocks);
        copy_table(m, table, place * 32 + lane, team_decoders * 32);
        ProductReader reader;
        if (n_blocks) {
            if (lane == 0) prefetch_scales(m, i), tiles.create();
            reader.open(m, stream, ring, lane);
            prefetch_raw(m, i, j, lane, launch.raw_words);
        }
        wait_for_table(n_blocks);
        __syncthreads();
        TileSink<FORMAT> sink(m, tiles, begun - 8 * Part(task).first_row, lane);
        if (n_blocks) {
            with(task.codec, [&](auto codec) INLINE {
                decode_blocks<FORMAT, decltype(codec)>(m, reader, table, lane, i, j, n_blocks, units_of(m, j, n_blocks), sink);
            });
        }
        wait_for_previous();
        __syncthreads();
    } else {
        const Part part(task);
        // Row blocks have multipliers.
        const Even rows{n_multipliers / part.n_rows, n_multipliers % part.n_rows};
        if (place == 0) cuts[team].work_out(m, part, 0, lane, [&](u32 r, u16 (&slots)[2]) INLINE { slots[0] = rows.begin(r), slots[1] = rows.begin(r + 1) - 1; });
        const u32 r = rows.owner(place), first = rows.begin(r), stride = rows.begin(r + 1) - first;
        if (lane == 0) Tiles::create(begun + 8 * place);
        Multiplier<FORMAT, EIGHTS> multiplier;
        __syncthreads();
        wait_for_previous();
        start_next();
        const Tiles tiles{windows + team * team_decoders * WINDOW + RING_BYTES, barriers + team * team_decoders * BARRIERS};
        const u32 first_decoder = part.warps.owner(r * m.n_col_blocks) + place - first;
        multiplier.template run<WINDOW>(m, part, r, first_decoder, stride, tiles, begun + 8 * r, launch.x, xs + (warp - n_decoders) * multiplier.BYTES);
        __syncthreads();
        multiplier.put(windows + team * slots_bytes + place * slot_bytes, launch.n_tokens);
    }
    put_out<FORMAT, 32, false>(launch, task, cuts, windows, slots_bytes, 0, [&](u32 token) INLINE { return FORMAT == INT8 ? launch.units[token] : 1; });
}

// What the end of multiply_tiles needs, besides sums.
struct End {
    double units[16];
    float scales[2][32], biases[2][32];
    float added[16][32];
};

// Products where no warp has more than one block, of no more than BLOCK_UNITS units: each decodes all of its own before the activations are known, and multiplies
// it. A thread block has one row block. EIGHTS is 0 for one token. Shared memory: the table (two with `gated`), in whose place come one token's activations; the
// warps' windows, of tiles, at the end of which the block's stream or raw bits lie, and parts, and then a slot; and End.
template <int EIGHTS, class With>
__device__ __forceinline__ void multiply_tiles(const Launch& launch, With with) {
    start_next();
    const u32 lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), n_warps = blockDim.x / 32;
    const u32 n_teams = launch.gated ? 2 : 1, team_warps = n_warps / n_teams, team = warp / team_warps, j = warp - team * team_warps;
    const Task& task = launch.gated ? launch.tasks[team] : find_task(launch);
    const Task& task0 = launch.gated ? launch.tasks[0] : task;
    const Matrix& m = task.matrix;
    const u32 shared = (u32)__cvta_generic_to_shared(shared_memory), table = shared + team * launch.table_bytes;
    const u32 windows = shared + n_teams * launch.table_bytes, tiles = windows + warp * launch.window;
    const u32 parts = tiles + launch.window - m.block_cols * 4, ring = parts - RING_BYTES;
    const u32 i = blockIdx.x - task0.first_cta, block = i * m.n_col_blocks + j, row = i * 32 + lane, n_tokens = EIGHTS ? launch.n_tokens : 1;
    const bool has_block = j < m.n_col_blocks, has_row = row < task0.matrix.n_rows;
    copy_table(m, table, j * 32 + lane, team_warps * 32);
    u32 units = 0;
    ProductReader reader;
    if (has_block) {
        units = units_of(m, j, 1);
        reader.open(m, Stream(m, block, block + 1), ring, lane);
        prefetch_raw(m, i, j, lane, launch.raw_words);
    }
    DotSink<INT8> dot(task, 0, 0, 0, row, lane);  // of which one token's activations are all that is used
    if (EIGHTS == 0) dot.look_ahead(launch);
    wait_for_table(has_block);
    __syncthreads();
    if (has_block) {
        BlockSink sink(m, block, tiles, lane);
        decode_parts(m, reader, table, lane, i, j, units, parts);
        with(task.codec, [&](auto codec) INLINE { finish_parts<decltype(codec)>(m, lane, i, j, units, parts, ring, sink); });
    }
    // What the sums are worth, and what they are added to, is asked for before they are there; not to registers. A warp has tokens as far apart as there are
    // warps, of which there are eight or more.
    constexpr int TURNS = EIGHTS ? EIGHTS : 1;
    End& end = *(End*)(shared_memory + n_teams * launch.table_bytes + n_warps * launch.window);
    if (j == 0 && has_row) end.scales[team][lane] = scale_of<INT8>(m, row), end.biases[team][lane] = task.bias ? element(task.bias, row, launch.bf16) : -0.0f;
    wait_for_previous();
    auto token_of = [&](int n) INLINE { return warp + n * n_warps; };
    auto place = [&](u32 token) INLINE { return (u64)token * task0.matrix.n_rows + row; };
#pragma unroll
    for (int n = 0; n < TURNS; n++) {
        const u32 token = token_of(n);
        if (token >= n_tokens || !has_row) break;
        if (EIGHTS && lane == 0) copy_async<8>((u32)__cvta_generic_to_shared(&end.units[token]), launch.units + token);
        if (task0.adds) copy_async<4>((u32)__cvta_generic_to_shared(&end.added[token][lane]), (const float*)task0.out + place(token));
    }
    commit_copies();
    if constexpr (EIGHTS > 0) {
        const uint4* x = (const uint4*)launch.x + j * (m.block_cols / 32) * EIGHTS * 32 + lane;
        if (has_block) multiply_block<EIGHTS>(tiles, units, x, tiles, n_tokens);
    } else {
        Input<1> input(launch.x, launch.norm, launch.bf16, m.n_cols);
        __syncthreads();  // the table has been read
        dot.prepare(launch, input, shared_memory);
        __syncthreads();
        if (has_block) multiply_block(tiles, units, (const uint2*)dot.x + j * (m.block_cols / 4), tiles);
    }
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int n = 0; n < TURNS; n++) {
        const u32 token = token_of(n);
        if (token >= n_tokens || !has_row) break;
        auto product = [&](u32 team) INLINE {
            const u32 slots = windows + team * team_warps * launch.window + (token * TOKEN_ROWS + lane) * 8;
            i64 sum = 0;
            add_slots<INT8>(sum, slots, (team ? launch.tasks[1] : task0).matrix.n_col_blocks, launch.window);
            return (float)((double)sum * ((double)end.scales[team][lane] * (EIGHTS ? end.units[token] : dot.unit()))) + end.biases[team][lane];
        };
        float y = product(0);
        if (launch.gated) y = product(1) * (y / (1 + expf(-y)));
        if (launch.bf16) ((__nv_bfloat16*)task0.out)[place(token)] = __float2bfloat16_rn(y);
        else ((float*)task0.out)[place(token)] = (task0.adds ? end.added[token][lane] : -0.0f) + y;
    }
}

// One warp a token and column block; grid (column blocks, tokens).
template <int FORMAT, class With>
__device__ __forceinline__ void gather(const Launch& launch, With with) {
    const Task& task = launch.tasks[0];
    const Matrix& m = task.matrix;
    const u32 table = (u32)__cvta_generic_to_shared(shared_memory);
    copy_table(m, table, threadIdx.x, 32);
    wait_for_previous();
    start_next();  // not before: what follows may read what the step began with
    const u32 lane = threadIdx.x % 32, token = launch.tokens[blockIdx.y];
    if (token >= m.n_rows) return;
    float* out = (float*)task.out + (u64)blockIdx.y * m.n_cols;
    ProductReader reader;
    const u32 block = token / 32 * m.n_col_blocks + blockIdx.x;
    reader.open(m, Stream(m, block, block + 1), table + launch.table_bytes, lane);
    GatherSink<FORMAT> sink{m, out, {}, lane, token / 32, token % 32, 0, scale_of<FORMAT>(m, token)};
    with(task.codec, [&](auto codec) INLINE { decode_blocks<FORMAT, decltype(codec)>(m, reader, table, lane, token / 32, blockIdx.x, 1, units_of(m, blockIdx.x, 1), sink); });
}

// Calls f with the codec that has these parts a symbol and raw bits: what the encoder chooses. Others (0) have kernels of their
// own, several times slower. engine/src/cuda/encoded.rs has the same list.
template <int FORMAT, class F>
__device__ __forceinline__ void with_codec(u32 codec, F f) {
#define CODEC(G, K) case G << 4 | K: return f(Codec<FORMAT, G, K>());
    if constexpr (FORMAT == INT8) {
        switch (codec) {
            CODEC(2, 0) CODEC(4, 0) CODEC(4, 1) CODEC(4, 2) CODEC(4, 3) CODEC(4, 4) CODEC(4, 5) CODEC(4, 6)
            CODEC(8, 3) CODEC(8, 4) CODEC(8, 5) CODEC(8, 6) CODEC(8, 7)
        }
    } else if constexpr (FORMAT == FP8) {
        switch (codec) { CODEC(4, 5) CODEC(4, 6) CODEC(2, 3) CODEC(2, 4) }
    } else {
        switch (codec) { CODEC(4, 9) CODEC(4, 10) CODEC(2, 7) CODEC(2, 8) }
    }
#undef CODEC
}

// The same for codes of a trellis: those of 2 to 7 bits.
template <class F>
__device__ __forceinline__ void with_trellis(u32 codec, F f) {
#define CODEC(G, K) case G << 4 | K: return f(Codec<INT8, G, K, true>());
    switch (codec) { CODEC(4, 1) CODEC(4, 2) CODEC(4, 3) CODEC(4, 4) CODEC(4, 5) CODEC(8, 3) CODEC(8, 4) CODEC(8, 5) CODEC(8, 6) }
#undef CODEC
}

// Those of either with eight parts a symbol.
template <bool TRELLIS, class F>
__device__ __forceinline__ void with_eights(u32 codec, F f) {
#define CODEC(K) case 8 << 4 | K: return f(Codec<INT8, 8, K, TRELLIS>());
    switch (codec) { CODEC(3) CODEC(4) CODEC(5) CODEC(6) }
    if constexpr (!TRELLIS) switch (codec) { CODEC(7) }
#undef CODEC
}

template <int FORMAT, class F>
__device__ __forceinline__ void with_any(u32, F f) { f(Codec<FORMAT, ANY, ANY>()); }

#define KERNEL_WITH(LIMIT, name, WITH, ...)                                   \
    extern "C" __global__ void LIMIT name(const __grid_constant__ Launch l) { \
        __VA_ARGS__(l, [](u32 codec, auto f) INLINE { WITH(codec, f); });     \
    }
#define KERNEL(THREADS, ...) KERNEL_WITH(__launch_bounds__(THREADS, 1), __VA_ARGS__)
// As many threads as there are registers for; those that decode to rows are as many warps as have room for a tile, with half as many registers again.
#define KERNELS(FORMAT, name, WITH)                                                            \
    KERNEL(640, decode_codes_##name, WITH, decode_shares<FORMAT, DenseSink<FORMAT, false>>)    \
    KERNEL(640, decode_values_##name, WITH, decode_shares<FORMAT, DenseSink<FORMAT, true>>)    \
    KERNEL(32, gather_rows_##name, WITH, gather<FORMAT>)                                       \
    KERNEL(1024, product_1_##name, WITH, multiply<FORMAT>)                                     \
    KERNEL(1024, product_8_##name, WITH, multiply_many<FORMAT, 1>)                             \
    KERNEL(1024, product_16_##name, WITH, multiply_many<FORMAT, 2>)

KERNELS(INT8, int8, with_codec<INT8>)
KERNELS(INT8, int8_trellis, with_trellis)
KERNELS(INT8, int8_any, with_any<INT8>)
KERNELS(FP8, fp8, with_codec<FP8>)
KERNELS(FP8, fp8_any, with_any<FP8>)
KERNELS(BF16, bf16, with_codec<BF16>)
KERNELS(BF16, bf16_any, with_any<BF16>)
// With so few registers that 42 warps fit on a multiprocessor: those of the kernels that follow decode while one waits.
KERNEL_WITH(__maxnreg__(48), product_1_int8_early, with_eights<false>, multiply<INT8, EARLY>)
KERNEL_WITH(__maxnreg__(48), product_1_int8_trellis_early, with_eights<true>, multiply<INT8, EARLY>)
#define TILES(name, TRELLIS)                                                           \
    KERNEL_WITH(__maxnreg__(48), product_1_##name, with_eights<TRELLIS>, multiply_tiles<0>) \
    KERNEL(1024, product_8_##name, with_eights<TRELLIS>, multiply_tiles<1>)            \
    KERNEL(1024, product_16_##name, with_eights<TRELLIS>, multiply_tiles<2>)
TILES(int8_tiles, false)
TILES(int8_trellis_tiles, true)
// For launches in which 28 warps take no more turns than 32 would: with registers for nearly all that those spill.
KERNEL(896, product_1_bf16_few, with_codec<BF16>, multiply<BF16>)

// One token's products of matrices that are not encoded. It just has the registers that it needs: one spilled to memory costs a tenth of a model's speed.
extern "C" __global__ void __launch_bounds__(512, 2) product_plain(const __grid_constant__ Launch l) {
    multiply<BF16, PLAIN>(l, nullptr);
}

// ---------------------------------------------------------------- activations

// Of shared memory that the launch asked for.
__device__ __forceinline__ u32 dynamic_bytes() {
    u32 v;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(v));
    return v;
}

// x [n_tokens, n_cols] -> an operand of products with more than one token. One thread block a token of the operand; those from n_tokens on are zero, as
// are the columns up to a multiple of 32.
struct Prepare {
    const void* x;  // f32, or bf16
    void* out;
    double* units;
    u32 n_tokens, n_cols, bf16;

    __device__ __forceinline__ Input<1> input() const {
        const u64 at = (u64)blockIdx.x * n_cols * (bf16 ? 2 : 4);
        return {blockIdx.x < n_tokens ? (const u8*)x + at : nullptr, nullptr, bf16 != 0, n_cols};
    }
};

// The operand of mma, 16 bytes a lane: [unit][8 tokens][lane][high 0-15, high 16-31, low 0-15, low 16-31][4]
extern "C" __global__ void __launch_bounds__(1024) prepare_int8_mma(const __grid_constant__ Prepare p) {
    start_next();
    wait_for_previous();
    const u32 token = blockIdx.x, tiles = gridDim.x / 8;
    auto input = p.input();
    input.keep(shared_memory, dynamic_bytes());
    input.read();
    const float ratio = fixed_ratio(input.most, input.finite());
    // A thread's quads are all the same one of a unit's eight.
    u32* const first = (u32*)p.out + ((u64)token / 8 * 32 + token % 8 * 4 + threadIdx.x % 4) * 4 + threadIdx.x % 8 / 4;
    input.for_each([&](u32 i, float4 v) INLINE {
        const Fixed a(v.x, ratio), b(v.y, ratio), c(v.z, ratio), d(v.w, ratio);
        u32* to = first + i / 8 * tiles * 128;
        to[0] = pack(a.high, b.high, c.high, d.high), to[2] = pack(a.low, b.low, c.low, d.low);
    });
    if (threadIdx.x == 0 && token < p.n_tokens) p.units[token] = fixed_unit(ratio, input.finite());
}

// The same for bf16, of 16 columns: [unit][half][8 tokens][lane][high 0-7, high 8-15, low 0-7, low 8-15][2], x = high + low but for 2^-17 of it.
extern "C" __global__ void __launch_bounds__(1024) prepare_float_mma(const __grid_constant__ Prepare p) {
    start_next();
    wait_for_previous();
    const u32 token = blockIdx.x, tiles = gridDim.x / 8;
    auto input = p.input();
    input.keep(shared_memory, dynamic_bytes());
    input.read();
    input.for_each([&](u32 i, float4 v) {
        const u32 lane = token % 8 * 4 + i % 2 * 2;
        u32* to = (u32*)p.out + (((u64)(i / 4) * tiles + token / 8) * 32 + lane) * 4 + i % 4 / 2;
        const float4 low = rest(v);
        to[0] = pack(v.x, v.y), to[4] = pack(v.z, v.w), to[2] = pack(low.x, low.y), to[6] = pack(low.z, low.w);
    });
}
