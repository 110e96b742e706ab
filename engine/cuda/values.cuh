// Codes as numbers, tiles of them in shared memory, and patches.
#pragma once
#include "decode.cuh"

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
