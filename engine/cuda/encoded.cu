// Kernels on encoded tensors: decode to codes or to BF16, gather rows, and products with 1 to 16 tokens.
//
// Each is one decoder (decode.cuh) with another sink. A launch takes several tensors, each of which gets a share of the thread blocks, and
// so loads its table once a thread block; the warps go over its blocks.
#include "common.cuh"
#include "decode.cuh"

constexpr u32 MAX_TASKS = 8;

// One tensor's part of a launch. engine/src/cuda/encoded.rs has the same structure, and the next.
struct Task {
    Matrix matrix;
    void* out;          // codes u8 or u16, or bf16 [n_rows, n_cols]; products and gathered rows: f32 [n_tokens, n_rows or n_cols]
    const float* bias;  // [n_rows], added to products; may be null
    u64* partials;      // [row block][strip][token][32]: i64 (int8) or double
    u32* arrived;       // [row block]: strips that are done; zero before and after a launch
    u32 first_cta, n_ctas;
    u32 strip;          // blocks of a row that a warp takes at once
    u32 n_strips;
    u32 span;           // blocks that a thread block takes at once, of whole row blocks, a warp each; 0: warps take any strips
    u32 early;          // with a span: the codes are decoded before the activations are known
    u32 codec;          // G and K, or 0 for any: see with_codec
    u32 adds;           // the product is added to what `out` holds
};
struct Launch {
    Task tasks[MAX_TASKS];
    u32 n_tasks, n_tokens;
    const void* x;        // one token: f32 [n_cols]; more: from prepare_*
    const double* units;  // [token], int8: what one of a fixed-point activation is worth
    const u32* tokens;    // gather: [n_tokens], the rows
    const float* norm;    // one token: [n_cols], the weight of an RMS norm that x goes through; may be null
    float eps;
    u32 gated;            // there are two products of as many rows; the first one's output is silu(first) * second
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
        const u32 turn = BYTES == 32 ? row >> 2 & 1 : BYTES == 64 ? row >> 1 & 3 : row & 7;
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
    // One 16 × 32-byte operand of mma from row `row` and byte `byte` on.
    __device__ __forceinline__ void load_matrix(u32 (&v)[4], u32 lane, u32 row, u32 byte) const {
        const u32 at = base + offset(row + (lane & 15), byte + (lane & 16));
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
    }
    template <int ELEMENT>
    __device__ __forceinline__ void put(u32 row, u32 byte, u32 value) const {
        const u32 at = base + offset(row, byte);
        if (ELEMENT == 1) asm volatile("st.shared.u8 [%0], %1;" ::"r"(at), "r"(value) : "memory");
        if (ELEMENT == 2) asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"((u16)value) : "memory");
    }
};

// A block's patches, in the order of columns.
struct Patches {
    const u32* list;
    u32 next, end;

    __device__ __forceinline__ void begin(const Matrix& m, u32 block) {
        list = m.patches;
        next = end = 0;
        if (m.patch_offsets) next = m.patch_offsets[block], end = m.patch_offsets[block + 1];
    }
    // Calls f(row, column, code) for those below column `stop` that are not yet done, each in one lane.
    template <class F>
    __device__ __forceinline__ void until(u32 stop, u32 lane, F f) {
        while (next < end) {
            const u32 patch = next + lane < end ? list[next + lane] : ~0u;
            const bool now = next + lane < end && patch >> 21 < stop;
            if (now) f(patch >> 16 & 31, patch >> 21, patch & 0xffff);
            const u32 done = __popc(__ballot_sync(FULL, now));
            next += done;
            if (done < 32) break;
        }
    }
};

// A value as 16-bit fixed point, 255 · high + low, as codec/src/product.rs defines it.
struct Fixed {
    i32 high, low;
    __device__ __forceinline__ Fixed(float v, float ratio) {
        const i32 fixed = (i32)rintf(__fmul_rn(v, ratio));
        high = (i32)rintf(__fmul_rn((float)fixed, 1.0f / 255.0f));
        low = fixed - 255 * high;
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

// Each of a token's activations as 16-bit fixed point: all threads of the block together
// call put(column, high, low) for all columns up to a multiple of 32. `x` null stands for zeros. Returns what one is worth.
template <class Put>
__device__ __forceinline__ double to_fixed(const float* x, u32 n_cols, Put put) {
    __shared__ float warp_max[32];
    __shared__ u32 all_finite;
    if (threadIdx.x == 0) all_finite = 1;
    __syncthreads();
    float most = 0;
    bool finite = true;
#pragma unroll 4
    for (u32 c = threadIdx.x; x && c < n_cols; c += blockDim.x) {
        const float v = fabsf(x[c]);
        most = fmaxf(most, v);
        finite = finite && v < __int_as_float(0x7f800000);
    }
    for (int s = 16; s > 0; s >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, s));
    if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = most;
    if (!finite) all_finite = 0;
    __syncthreads();
    most = 0;
    for (u32 w = 0; w < blockDim.x / 32; w++) most = fmaxf(most, warp_max[w]);
    const float ratio = fixed_ratio(most, all_finite);
#pragma unroll 4
    for (u32 c = threadIdx.x; c < (n_cols + 31) / 32 * 32; c += blockDim.x) {
        const Fixed fixed(x && c < n_cols ? x[c] : 0, ratio);
        put(c, fixed.high, fixed.low);
    }
    return fixed_unit(ratio, all_finite);
}

// One token's activations, read by all threads of the block together, times the norm's weight. `held` are those of the first
// columns, so that they need not be read again.
struct Input {
    static constexpr u32 HELD = 2;
    const float* x;
    const float* norm;
    u32 n_cols, n_quads;  // n_quads: up to a multiple of 32 columns
    float4 held[HELD];
    float squares = 0, most = 0;
    bool finite = true;

    __device__ __forceinline__ float4 quad(const float* from, u32 i) const {
        if (n_cols % 4 == 0) return 4 * i < n_cols ? ((const float4*)from)[i] : float4{};
        auto at = [&](u32 c) { return c < n_cols ? from[c] : 0.0f; };
        return {at(4 * i), at(4 * i + 1), at(4 * i + 2), at(4 * i + 3)};
    }
    // Columns 4i to 4i + 3, and whether their squares were counted before.
    __device__ __forceinline__ float4 load(u32 i, bool counts) {
        float4 v = quad(x, i);
        if (counts) squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        if (norm) {
            const float4 w = quad(norm, i);
            v.x *= w.x, v.y *= w.y, v.z *= w.z, v.w *= w.w;
        }
        if (!counts) return v;
        const float a = fmaxf(fabsf(v.x), fabsf(v.y)), b = fmaxf(fabsf(v.z), fabsf(v.w));
        most = fmaxf(most, fmaxf(a, b));
        const float inf = __int_as_float(0x7f800000);
        finite = finite && fabsf(v.x) < inf && fabsf(v.y) < inf && fabsf(v.z) < inf && fabsf(v.w) < inf;
        return v;
    }
    // Reads all; afterwards `squares`, `most` and `finite` are the block's.
    __device__ __forceinline__ Input(const Launch& launch, u32 n_cols) : x((const float*)launch.x), norm(launch.norm), n_cols(n_cols) {
        __shared__ float partial[2][32];
        n_quads = (n_cols + 31) / 32 * 8;
#pragma unroll
        for (u32 h = 0; h < HELD; h++) {
            const u32 i = threadIdx.x + h * blockDim.x;
            held[h] = i < n_quads ? load(i, true) : float4{};
        }
        for (u32 i = threadIdx.x + HELD * blockDim.x; i < n_quads; i += blockDim.x) load(i, true);
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        squares = warp_sum(squares), most = warp_max(most);
        if (lane == 0) partial[0][warp] = squares, partial[1][warp] = most;
        finite = __syncthreads_and(finite);
        squares = warp_sum(lane < blockDim.x / 32 ? partial[0][lane] : 0);
        most = warp_max(lane < blockDim.x / 32 ? partial[1][lane] : 0);
    }
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
        for (u32 i = threadIdx.x + HELD * blockDim.x; i < n_quads; i += blockDim.x) put(i, load(i, false));
    }
};

// ---------------------------------------------------------------- sinks

// Rows of codes, or of bf16 values, staged so that every store is of whole lines.
template <int FORMAT, bool VALUES>
struct DenseSink {
    static constexpr int ELEMENT = VALUES || FORMAT == BF16 ? 2 : 1, UNIT = 32 * ELEMENT, TILE_BYTES = 4096;
    static constexpr bool MASKS = false;
    const Matrix& m;
    u8* out;
    Tile<128> tile;
    Patches patches;
    u32 lane, i, first_col, n_cols;
    float scale;
    u32 held[8 * ELEMENT];

    __device__ __forceinline__ DenseSink(const Task& task, u32 scratch, u32 lane) : m(task.matrix), out((u8*)task.out), tile{scratch}, lane(lane) {}
    __device__ __forceinline__ void begin_block(u32 i_, u32 j) {
        i = i_, scale = VALUES && i * 32 + lane < m.n_rows ? scale_of<FORMAT>(m, i * 32 + lane) : 0;
        first_col = j * m.block_cols, n_cols = min(m.block_cols, m.n_cols - first_col);
        patches.begin(m, i * m.n_col_blocks + j);
    }
    template <class W>
    __device__ __forceinline__ void quad(u32, int q, Quad quad, W) {
        if (VALUES) quad = to_bf16<FORMAT>(quad, scale);
        held[q * ELEMENT] = quad.a;
        if constexpr (ELEMENT == 2) held[q * 2 + 1] = quad.b;
    }
    __device__ __forceinline__ void end_unit(u32 u) {
        constexpr u32 PER_TILE = 128 / UNIT;
        const u32 lane = again(this->lane);
        const u32 byte = u % PER_TILE * UNIT;
#pragma unroll
        for (int c = 0; c < 2 * ELEMENT; c++) tile.store(lane, byte + 16 * c, held[4 * c], held[4 * c + 1], held[4 * c + 2], held[4 * c + 3]);
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
        const u32 used = min(128u, (n_cols - tile_col) * ELEMENT), rows = min(32u, m.n_rows - i * 32);
        u8* to = out + ((u64)i * 32 * m.n_cols + first_col + tile_col) * ELEMENT;
        const u64 stride = (u64)m.n_cols * ELEMENT;
        if (stride % 16 == 0) {
#pragma unroll
            for (u32 r = 0; r < 32; r += 4) {
                const u32 row = r + lane / 8, byte16 = lane % 8 * 16;
                if (row < rows && byte16 < used) __stcs((uint4*)(to + row * stride + byte16), tile.load(row, byte16));
            }
        } else {
            for (u32 e = lane; e < rows * 32; e += 32) {  // four bytes of a row each, element by element
                const u32 row = e / 32, at = e % 32 * 4;
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
};

// One row of the row block, as f32, to a token's place.
template <int FORMAT>
struct GatherSink {
    static constexpr int TILE_BYTES = 0;
    static constexpr bool MASKS = false;
    const Matrix& m;
    float* out;  // [n_cols]
    Patches patches;
    u32 lane, i, row, first_col;
    float scale;

    __device__ __forceinline__ void begin_block(u32, u32 j) {
        first_col = j * m.block_cols;
        patches.begin(m, i * m.n_col_blocks + j);
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
};

__device__ __forceinline__ void add(i64& sum, u64 partial) { sum += (i64)partial; }
__device__ __forceinline__ void add(double& sum, u64 partial) { sum += __longlong_as_double((i64)partial); }

// Row `i * 32 + lane` of the product for TOKENS tokens from `first` on: its parts, added up in their order, times the scale, and the bias.
template <int FORMAT, int TOKENS>
__device__ __forceinline__ void add_up(const Task& task, const Launch& launch, double unit, u32 i, u32 lane, u32 first, float (&y)[TOKENS]) {
    const u32 row = i * 32 + lane, n_tokens = launch.n_tokens, n_parts = task.span ? 1 : task.n_strips;
    const bool exists = row < task.matrix.n_rows;
    const float scale = exists ? scale_of<FORMAT>(task.matrix, row) : 0, bias = task.bias && exists ? task.bias[row] : 0;
    typename std::conditional<FORMAT == INT8, i64, double>::type sums[TOKENS] = {};
    const u64* from = task.partials + ((u64)i * n_parts * n_tokens + first) * 32 + lane;
#pragma unroll (8 / TOKENS)
    for (u32 s = 0; s < n_parts; s++, from += n_tokens * 32) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (TOKENS == 1 || first + t < n_tokens) add(sums[t], __ldcg(from + t * 32));
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const double factor = (double)scale * (FORMAT == INT8 && TOKENS > 1 && first + t < n_tokens ? launch.units[first + t] : unit);
        y[t] = (float)((double)sums[t] * factor);
        if (task.bias) y[t] += bias;
    }
}

// Adds up the parts of a row block, once the last of them is there, always in the same order. Takes TOKENS at a time.
// `unit` is what one token's sums are worth, the scale aside. Not inline, for the registers of the loops around it.
template <int FORMAT, int TOKENS>
__device__ __noinline__ void finish_rows(const Task& own, const Launch& launch, double unit, u32 i, u32 lane) {
    const Task& task = launch.gated ? launch.tasks[0] : own;
    const Task& second = launch.tasks[1];
    const u32 n_parts = (task.span ? 1 : task.n_strips) + (!launch.gated ? 0 : second.span ? 1 : second.n_strips);
    const u32 row = i * 32 + lane, n_rows = task.matrix.n_rows, n_tokens = launch.n_tokens;
    if (n_parts > 1) {
        // Release and acquire rather than __threadfence, which would throw the first-level cache away with every part.
        __syncwarp();
        u32 before = 0;
        if (lane == 0) asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(own.arrived + i) : "memory");
        before = __shfl_sync(FULL, before, 0);
        __syncwarp();
        if (before != n_parts - 1) return;
        if (lane == 0) task.arrived[i] = 0;
    }
    for (u32 first = 0; first < n_tokens; first += TOKENS) {
        float y[TOKENS], up[TOKENS];
        add_up<FORMAT, TOKENS>(task, launch, unit, i, lane, first, y);
        if (launch.gated) add_up<FORMAT, TOKENS>(second, launch, unit, i, lane, first, up);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            const u32 token = first + t;
            if (row >= n_rows || token >= n_tokens) continue;
            float* out = (float*)task.out + (u64)token * n_rows + row;
            if (launch.gated) y[t] *= up[t] / (1 + expf(-y[t]));
            *out = task.adds ? *out + y[t] : y[t];
        }
    }
}

// Adds up one token's parts of the warps that share a row block; true in the first of these, which then has their sum. The `n_warps` first warps of
// the thread block call it. `tile` is the warp's place in shared memory, the others' are `stride` apart.
template <class T>
__device__ __forceinline__ bool share_rows(const Task& task, T& sum, u32 tile, u32 stride, u32 n_warps, u32 lane_) {
    const u32 lane = again(lane_);
    asm volatile("st.shared.u64 [%0], %1;" ::"r"(tile + 8 * lane), "l"(*(u64*)&sum) : "memory");
    asm volatile("bar.sync 1, %0;" ::"r"(n_warps * 32) : "memory");
    if (threadIdx.x / 32 % task.n_strips) return false;
    for (u32 s = 1; s < task.n_strips; s++) {
        u64 part;
        asm volatile("ld.shared.u64 %0, [%1];" : "=l"(part) : "r"(tile + s * stride + 8 * lane) : "memory");
        sum += *(T*)&part;
    }
    return true;
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
// cores, x as the sum of two bf16 numbers; the rows beside one that has a weight which is no number get none either.
//
// There a lane's columns, which are all of its own row, stand where the operand has four rows' (row g = lane / 4, columns of t = lane % 4): so
// the activations are, in column n of the other operand, those of the lanes with t = n % 4 and zeros for the others, and the products of the
// lane's row come out in column t (of its first four columns) and in column t + 4 of row g + 8 (of the next four).
template <int FORMAT>
struct DotSink {
    static constexpr int TILE_BYTES = FORMAT == INT8 ? EARLY_BYTES : 256;
    static constexpr bool MASKS = FORMAT != INT8, EARLY = FORMAT == INT8;
    const Matrix& m;
    // Shared, the columns four by four. int8: high 4, low 4; fp8: f32; bf16: high 4, low 4. Behind them, what a sum is worth (double); at 16
    // bytes from there, 128 bytes of zeros.
    const u8* x;
    Patches patches;
    u32 scratch, lane, i, first_col, n_cols;
    i32 high = 0, low = 0;
    float sums[4] = {};
    double total = 0;   // bf16: of the blocks before
    const uint4* x_next;  // the unit's
    uint4 pair;           // int8: of two quads
    Quad even;

    __device__ __forceinline__ DotSink(const Launch&, const Task& task, u32 scratch, u32 lane)
        : m(task.matrix), scratch(scratch), lane(lane) {}
    // What comes from device memory and depends on no other kernel.
    __device__ __forceinline__ void look_ahead(const Launch& launch) {
        for (u32 c = threadIdx.x * 32; launch.norm && c < m.n_cols; c += blockDim.x * 32) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(launch.norm + c));
        }
    }
    // `shared` has room for the activations. All threads call it.
    __device__ __forceinline__ void prepare(const Launch& launch, u8* shared) {
        x = shared;
        Input input(launch, m.n_cols);
        const float ratio = fixed_ratio(input.most, input.finite);
        input.for_each([&](u32 i, float4 v) {
            if constexpr (FORMAT == INT8) {
                const Fixed a(v.x, ratio), b(v.y, ratio), c(v.z, ratio), d(v.w, ratio);
                auto pack = [](i32 a, i32 b, i32 c, i32 d) { return prmt(prmt(a, b, 0x0040), prmt(c, d, 0x0040), 0x5410); };
                ((uint2*)shared)[i] = {pack(a.high, b.high, c.high, d.high), pack(a.low, b.low, c.low, d.low)};
            } else if constexpr (FORMAT == BF16) {
                auto pack = [](float a, float b) {
                    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
                    return *(const u32*)&pair;
                };
                auto rest = [](float v) { return v - __bfloat162float(__float2bfloat16_rn(v)); };
                ((uint4*)shared)[i] = {pack(v.x, v.y), pack(v.z, v.w), pack(rest(v.x), rest(v.y)), pack(rest(v.z), rest(v.w))};
            } else {
                ((float4*)shared)[i] = v;
            }
        });
        double unit = input.factor(launch.eps);
        if (FORMAT == INT8) unit *= fixed_unit(ratio, input.finite);
        *(double*)unit_at() = unit;
        if (FORMAT == BF16 && threadIdx.x < 8) ((uint4*)(unit_at() + 16))[threadIdx.x] = {};
    }
    __device__ __forceinline__ const u8* unit_at() const { return x + (m.n_cols + 31) / 32 * (FORMAT == INT8 ? 64 : 128); }
    __device__ __forceinline__ bool reads_x() const { return lane / 4 % 4 == lane % 4; }
    __device__ __forceinline__ void begin_strip(u32 i_) {
        i = i_, high = low = 0, total = 0;
        for (int c = 0; c < 4; c++) sums[c] = 0;
        // They are needed at the end.
        if (lane == 0 && m.scale_kind > 1) asm volatile("prefetch.global.L2 [%0];" ::"l"((const u8*)m.scales + (m.scale_kind == 2 ? 128 : 64) * (u64)i));
    }
    __device__ __forceinline__ void begin_block(u32, u32 j) {
        first_col = j * m.block_cols, n_cols = min(m.block_cols, m.n_cols - first_col);
        x_next = (const uint4*)x + first_col / (FORMAT == INT8 ? 8 : 4);
        if (FORMAT == BF16) x_next = reads_x() ? x_next + lane / 16 : (const uint4*)(unit_at() + 16);
        patches.begin(m, i * m.n_col_blocks + j);
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
    __device__ __forceinline__ void end_unit(u32) {
        if (FORMAT == INT8) x_next += 4;
        if (FORMAT == BF16 && reads_x()) x_next += 8;
    }
    __device__ __forceinline__ void end_block() {
        if constexpr (FORMAT == BF16) {
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
        if (patches.next == patches.end) return;
        if constexpr (FORMAT == INT8) {
            // The sums are exact, so that the order does not matter.
            const u32 at = again(scratch) + 8 * again(lane);
            asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(high), "r"(low) : "memory");
            __syncwarp();
            patches.until(~0u, lane, [&](u32 row, u32 col, u32 code) {
                const i32 change = (i32)(signed char)code - (i32)(signed char)m.filler;
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
            for (; patches.next < patches.end; patches.next += 32) {
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(owners + 4 * lane), "r"(0) : "memory");
                __syncwarp();
                if (patches.next + lane < patches.end) {
                    const u32 patch = __ldg(patches.list + patches.next + lane), c = first_col + (patch >> 21);
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
            }
        }
    }
    __device__ __forceinline__ void end_strip(const Task& task, const Launch& launch, u32 strip) {
        typename std::conditional<FORMAT == INT8, i64, double>::type sum;
        if constexpr (FORMAT == INT8) sum = 255 * (i64)high + low;
        else sum = total + ((double)sums[0] + sums[1] + ((double)sums[2] + sums[3]));
        if (task.span) {
            const u32 first = (blockIdx.x - task.first_cta) * task.span, n_all = (m.n_rows + 31) / 32 * task.n_strips;
            if (!share_rows(task, sum, scratch, RING_BYTES + TILE_BYTES, min(task.span, n_all - first), lane)) return;
            const u32 row = i * 32 + lane;
            if (!launch.gated) {
                if (row >= m.n_rows) return;
                float* out = (float*)task.out + row;
                float y = (float)((double)sum * ((double)scale_of<FORMAT>(m, row) * *(const double*)unit_at()));
                if (task.bias) y += task.bias[row];
                *out = task.adds ? *out + y : y;
                return;
            }
        }
        task.partials[(u64)(task.span ? i : i * task.n_strips + strip) * 32 + lane] = *(u64*)&sum;
        finish_rows<FORMAT, 1>(task, launch, *(const double*)unit_at(), i, lane);
    }
};

// 2 to 16 tokens: TILES × 8 of them, on the tensor cores. int8: exact. Others: bf16 operands, x as the sum of two, sums in float32.
template <int FORMAT, int TILES>
struct MmaSink {
    static constexpr int ELEMENT = FORMAT == INT8 ? 1 : 2, TILE_BYTES = 1024 * ELEMENT;
    static constexpr bool MASKS = FORMAT != INT8, EARLY = false;
    using Sum = typename std::conditional<FORMAT == INT8, i32, float>::type;
    const Matrix& m;
    const uint4* x;
    Tile<32 * ELEMENT> tile;
    Patches patches;
    u32 lane, i, first_col, n_cols;
    u32 held[8 * ELEMENT];
    // [half of the rows][tokens][high, low: int8 only]
    Sum sums[2][TILES][FORMAT == INT8 ? 2 : 1][4];
    uint4 xs[TILES][ELEMENT];

    __device__ __forceinline__ MmaSink(const Launch& launch, const Task& task, u32 scratch, u32 lane)
        : m(task.matrix), x((const uint4*)launch.x), tile{scratch}, lane(lane) {}
    __device__ __forceinline__ void look_ahead(const Launch&) {}
    __device__ __forceinline__ void prepare(const Launch&, u8*) {}
    __device__ __forceinline__ void begin_strip(u32 i_) {
        i = i_;
        Sum* all = &sums[0][0][0][0];
#pragma unroll
        for (int s = 0; s < (int)(sizeof sums / sizeof(Sum)); s++) all[s] = 0;
    }
    __device__ __forceinline__ void begin_block(u32, u32 j) {
        first_col = j * m.block_cols, n_cols = min(m.block_cols, m.n_cols - first_col);
        patches.begin(m, i * m.n_col_blocks + j);
    }
    __device__ __forceinline__ void load_x(u32 u) {
        const uint4* from = x + (u64)(first_col / 32 + u) * TILES * ELEMENT * 32 + lane;
#pragma unroll
        for (int t = 0; t < TILES; t++) {
#pragma unroll
            for (int k = 0; k < ELEMENT; k++) xs[t][k] = __ldg(from + (t * ELEMENT + k) * 32);
        }
    }
    template <class W>
    __device__ __forceinline__ void quad(u32 u, int q, Quad quad, W whole) {
        if (q == 0) load_x(u);
        if (FORMAT == FP8) quad = to_bf16<FP8>(quad, 1);
        if (MASKS && !holds(whole)) quad = first_columns<2>(quad, (i32)n_cols - (i32)(u * 32 + q * 4));
        held[q * ELEMENT] = quad.a;
        if constexpr (ELEMENT == 2) held[q * 2 + 1] = quad.b;
    }
    __device__ __forceinline__ void end_unit(u32 u) {
#pragma unroll
        for (int c = 0; c < 2 * ELEMENT; c++) tile.store(lane, 16 * c, held[4 * c], held[4 * c + 1], held[4 * c + 2], held[4 * c + 3]);
        __syncwarp();
        if (patches.next < patches.end) {
            patches.until((u + 1) * 32, lane, [&](u32 row, u32 col, u32 code) {
                u32 element = code;
                if (FORMAT == FP8) {
                    const __nv_bfloat16 v = __float2bfloat16_rn(value_of<FP8>(code));
                    element = *(const u16*)&v;
                }
                tile.template put<ELEMENT>(row, (col - u * 32) * ELEMENT, element);
            });
            __syncwarp();
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int k = 0; k < ELEMENT; k++) {
                u32 a[4];
                tile.load_matrix(a, lane, 16 * half, 32 * k);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const uint4 b = xs[t][k];
                    if constexpr (FORMAT == INT8) {
                        mma(sums[half][t][0], a, b.x, b.y);
                        mma(sums[half][t][1], a, b.z, b.w);
                    } else {
                        mma(sums[half][t][0], a, b.x, b.y);
                        mma(sums[half][t][0], a, b.z, b.w);
                    }
                }
            }
        }
        __syncwarp();
    }
    __device__ __forceinline__ void end_block() {}
    __device__ __forceinline__ void end_strip(const Task& task, const Launch& launch, u32 strip) {
        u64* to = task.partials + (u64)(i * task.n_strips + strip) * launch.n_tokens * 32;
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int t = 0; t < TILES; t++) {
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    const u32 row = 16 * half + 8 * (s / 2) + lane / 4, token = 8 * t + lane % 4 * 2 + s % 2;
                    if (token >= launch.n_tokens) continue;
                    if constexpr (FORMAT == INT8) to[token * 32 + row] = (u64)(255 * (i64)sums[half][t][0][s] + sums[half][t][1][s]);
                    else to[token * 32 + row] = (u64)__double_as_longlong(sums[half][t][0][s]);
                }
            }
        }
        finish_rows<FORMAT, 8>(task, launch, 1, i, lane);
    }
};

// ---------------------------------------------------------------- kernels

extern __shared__ __align__(1024) u8 shared_memory[];

__device__ __forceinline__ const Task& find_task(const Launch& launch) {
    u32 t = 0;
    while (t + 1 < launch.n_tasks && blockIdx.x >= launch.tasks[t + 1].first_cta) t++;
    return launch.tasks[t];
}

// This warp's scratch memory: the ring, then the sink's tile.
__device__ __forceinline__ u32 warp_memory(const Matrix& m, u32 tile_bytes) {
    return (u32)__cvta_generic_to_shared(shared_memory) + (8 << m.table_bits) + threadIdx.x / 32 * (RING_BYTES + tile_bytes);
}

// For lambdas whose captures have to stay in registers.
#define INLINE __attribute__((always_inline))

// Every warp decodes its share of a matrix's blocks, one behind the other.
template <int FORMAT, class Sink, class With>
__device__ __forceinline__ void decode_shares(const Launch& launch, With with) {
    const Task& task = find_task(launch);
    const Matrix& m = task.matrix;
    const u32 lane = threadIdx.x % 32, n_warps = blockDim.x / 32, n_shares = task.n_ctas * n_warps;
    const u32 share = (blockIdx.x - task.first_cta) * n_warps + threadIdx.x / 32;
    const u64 n_blocks = (m.n_rows + 31) / 32 * m.n_col_blocks;
    const u32 first = n_blocks * share / n_shares, end = n_blocks * (share + 1) / n_shares;
    const u32 table = (u32)__cvta_generic_to_shared(shared_memory), ring = warp_memory(m, Sink::TILE_BYTES);
    Reader reader;
    if (first < end) {
        reader.open(m, first, ring, lane);
        prefetch_raw(m, first / m.n_col_blocks, first % m.n_col_blocks, lane);
    }
    load_table(m, (uint2*)shared_memory);
    wait_for_previous();
    start_next();
    __syncthreads();
    if (first == end) return;
    Sink sink(task, ring + RING_BYTES, lane);
    with(task.codec, [&](auto codec) INLINE { decode_blocks<FORMAT, decltype(codec)>(m, reader, table, lane, first, end, sink); });
}

// `with` is with_codec or its like.
template <int FORMAT, class Sink, class With>
__device__ __forceinline__ void go_over_strips(const Launch& launch, With with) {
    const Task& task = find_task(launch);
    const Matrix& m = task.matrix;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    const u32 n_all = (m.n_rows + 31) / 32 * task.n_strips, cta = blockIdx.x - task.first_cta;
    // The warps past `span` only help with what comes first.
    const u32 n_items = task.span && warp >= task.span ? 0 : n_all;
    const u32 first = task.span ? cta * task.span + warp : warp * task.n_ctas + cta;
    const u32 step = task.span ? n_all : task.n_ctas * n_warps;
    const u32 table = (u32)__cvta_generic_to_shared(shared_memory), ring = warp_memory(m, Sink::TILE_BYTES);
    // What depends on no other kernel: the first block's bytes, and the table.
    Reader reader;
    auto open = [&](u32 item) {
        reader.open(m, item / task.n_strips * m.n_col_blocks + item % task.n_strips * task.strip, ring, lane);
    };
    if (first < n_items) {
        open(first);
        prefetch_raw(m, first / task.n_strips, first % task.n_strips * task.strip, lane);
    }
    load_table(m, (uint2*)shared_memory);
    Sink sink(launch, task, ring + RING_BYTES, lane);
    sink.look_ahead(launch);
    // While the kernel before this one is at work.
    const bool early = Sink::EARLY && task.early;
    if (early) {
        __syncthreads();
        if (first < n_items) {
            const u32 units = m.block_cols / 32;
            decode_parts(m, reader, table, lane, min(units, m.n_units - first % task.n_strips * units), ring + RING_BYTES);
        }
    }
    wait_for_previous();
    // Not before: of three kernels on the way at once, some multiprocessors would get several thread blocks, others none.
    start_next();
    sink.prepare(launch, shared_memory + (8 << m.table_bits) + n_warps * (RING_BYTES + Sink::TILE_BYTES));
    __syncthreads();
    with(task.codec, [&](auto codec) INLINE {
#pragma unroll 1
        for (u32 item = first; item < n_items;) {
            const u32 i = item / task.n_strips, strip = item % task.n_strips, j = strip * task.strip;
            item += step;
            sink.begin_strip(i);
            if (early) {
                sink.begin_block(i, j);
                finish_parts<decltype(codec)>(m, ring + RING_BYTES, lane, i, j, sink);
                sink.end_block();
            } else {
                if (item < n_items) {
                    const u32 next_i = item / task.n_strips, next_j = item % task.n_strips * task.strip;
                    prefetch_stream(m, next_i * m.n_col_blocks + next_j, lane);
                    prefetch_raw(m, next_i, next_j, lane);
                }
                const u32 row = i * m.n_col_blocks, end = min(j + task.strip, m.n_col_blocks);
                decode_blocks<FORMAT, decltype(codec)>(m, reader, table, lane, row + j, row + end, sink);
                if (item < n_items) open(item);
            }
            sink.end_strip(task, launch, strip);
        }
    });
}

// One warp a token and column block; grid (column blocks, tokens).
template <int FORMAT, class With>
__device__ __forceinline__ void gather(const Launch& launch, With with) {
    const Task& task = launch.tasks[0];
    const Matrix& m = task.matrix;
    load_table(m, (uint2*)shared_memory);
    __syncwarp();
    wait_for_previous();
    start_next();  // not before: what follows may read what the step began with
    const u32 lane = threadIdx.x % 32, token = launch.tokens[blockIdx.y];
    if (token >= m.n_rows) return;
    const u32 table = (u32)__cvta_generic_to_shared(shared_memory);
    float* out = (float*)task.out + (u64)blockIdx.y * m.n_cols;
    Reader reader;
    const u32 block = token / 32 * m.n_col_blocks + blockIdx.x;
    reader.open(m, block, warp_memory(m, 0), lane);
    GatherSink<FORMAT> sink{m, out, {}, lane, token / 32, token % 32, 0, scale_of<FORMAT>(m, token)};
    with(task.codec, [&](auto codec) INLINE { decode_blocks<FORMAT, decltype(codec)>(m, reader, table, lane, block, block + 1, sink); });
}

// Calls f with the codec that has these parts a symbol and raw bits: what the encoder chooses. Others (0) have kernels of their
// own, several times slower. engine/src/cuda/encoded.rs has the same list.
template <int FORMAT, class F>
__device__ __forceinline__ void with_codec(u32 codec, F f) {
#define CODEC(G, K) case G << 4 | K: return f(Codec<FORMAT, G, K>());
    if constexpr (FORMAT == INT8) {
        switch (codec) {
            CODEC(4, 1) CODEC(4, 2) CODEC(4, 3) CODEC(4, 4) CODEC(4, 5) CODEC(4, 6)
            CODEC(8, 3) CODEC(8, 4) CODEC(8, 5) CODEC(8, 6) CODEC(8, 7)
        }
    } else if constexpr (FORMAT == FP8) {
        switch (codec) { CODEC(4, 6) CODEC(2, 3) }
    } else {
        switch (codec) { CODEC(4, 9) CODEC(4, 10) CODEC(2, 7) CODEC(2, 8) }
    }
#undef CODEC
}

// Each kernel twice: for the codecs of with_codec, and for any.
#define KERNEL(THREADS, name, FORMAT, ...)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const __grid_constant__ Launch l) {       \
        __VA_ARGS__(l, [](u32 codec, auto f) INLINE { with_codec<FORMAT>(codec, f); });                     \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name##_any(const __grid_constant__ Launch l) { \
        __VA_ARGS__(l, [](u32, auto f) INLINE { f(Codec<FORMAT, ANY, ANY>()); });                           \
    }
#define KERNELS(FORMAT, name)                                                                    \
    KERNEL(1024, decode_codes_##name, FORMAT, decode_shares<FORMAT, DenseSink<FORMAT, false>>)   \
    KERNEL(1024, decode_values_##name, FORMAT, decode_shares<FORMAT, DenseSink<FORMAT, true>>)   \
    KERNEL(32, gather_rows_##name, FORMAT, gather<FORMAT>)                                       \
    KERNEL(1024, product_1_##name, FORMAT, go_over_strips<FORMAT, DotSink<FORMAT>>)              \
    KERNEL(512, product_8_##name, FORMAT, go_over_strips<FORMAT, MmaSink<FORMAT, 1>>)            \
    KERNEL(512, product_16_##name, FORMAT, go_over_strips<FORMAT, MmaSink<FORMAT, 2>>)

KERNELS(INT8, int8)
KERNELS(FP8, fp8)
KERNELS(BF16, bf16)

// ---------------------------------------------------------------- activations

// x [n_tokens, n_cols] -> an operand of products with more than one token. One thread block a token of the operand; those from n_tokens on are zero, as
// are the columns up to a multiple of 32.
struct Prepare {
    const float* x;
    void* out;
    double* units;
    u32 n_tokens, n_cols;
};

// The operand of mma, 16 bytes a lane: [unit][8 tokens][lane][high 0-15, high 16-31, low 0-15, low 16-31][4]
extern "C" __global__ void prepare_int8_mma(const __grid_constant__ Prepare p) {
    start_next();
    wait_for_previous();
    const u32 token = blockIdx.x, tiles = gridDim.x / 8;
    const float* x = token < p.n_tokens ? p.x + (u64)token * p.n_cols : nullptr;
    const double unit = to_fixed(x, p.n_cols, [&](u32 c, i32 high, i32 low) {
        const u32 in_unit = c % 32, lane = token % 8 * 4 + in_unit % 16 / 4;
        signed char* to = (signed char*)p.out + ((u64)(c / 32 * tiles + token / 8) * 32 + lane) * 16 + in_unit / 16 * 4 + in_unit % 4;
        to[0] = high, to[8] = low;
    });
    if (threadIdx.x == 0 && x) p.units[token] = unit;
}

// The same for bf16, of 16 columns: [unit][8 tokens][half][lane][high 0-7, high 8-15, low 0-7, low 8-15][2], x = high + low but for 2^-17 of it.
extern "C" __global__ void prepare_float_mma(const __grid_constant__ Prepare p) {
    start_next();
    wait_for_previous();
    const u32 token = blockIdx.x, tiles = gridDim.x / 8;
    for (u32 c = threadIdx.x; c < (p.n_cols + 31) / 32 * 32; c += blockDim.x) {
        const float v = token < p.n_tokens && c < p.n_cols ? p.x[(u64)token * p.n_cols + c] : 0;
        const __nv_bfloat16 high = __float2bfloat16_rn(v), low = __float2bfloat16_rn(v - __bfloat162float(high));
        const u32 in_half = c % 16, lane = token % 8 * 4 + in_half % 8 / 2;
        __nv_bfloat16* to = (__nv_bfloat16*)p.out + (((u64)(c / 32 * tiles + token / 8) * 2 + c % 32 / 16) * 32 + lane) * 8 + in_half / 8 * 2 + in_half % 2;
        to[0] = high, to[4] = low;
    }
}
