// What products multiply with, as it is read and prepared by a thread block.
#pragma once
#include "common.cuh"
#include "decode.cuh"

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
template <u32 HELD, u32 TOGETHER>
struct Input {
    const void* x;  // f32, or bf16
    const float* norm;
    bool bf16;
    u32 n_cols, n_quads;  // n_quads: up to a multiple of 32 columns
    float4 held[HELD], held_weights[HELD];
    float squares = 0, most = 0;  // `most`: magnitude, or what is no number, whose bits are more than any other's
    const u8* kept = nullptr;     // what keep() copied, and where it ends
    u32 kept_end = 0;

    // Asks for what depends on no other kernel, the norm's weights of the first columns. `x` null stands for zeros.
    __device__ __forceinline__ Input(const void* x, const float* norm, bool bf16, u32 n_cols)
        : x(x), norm(norm), bf16(bf16), n_cols(x ? n_cols : 0), n_quads((n_cols + 31) / 32 * 8) {
        ask_weights(threadIdx.x, held_weights);
    }
    // Asks for the first columns.
    __device__ __forceinline__ void ask_held() { ask(x, bf16, threadIdx.x, held); }
    // Asks for quads as far apart as the block is wide. They stay as they lie in memory until numbers() is told of them, for whoever makes something of one waits
    // for it, and the next is not yet asked for.
    template <u32 N>
    __device__ __forceinline__ void ask(const void* from, bool bf16, u32 first, float4 (&to)[N]) const {
        auto each = [&](auto load) INLINE {
#pragma unroll
            for (u32 n = 0; n < N; n++) to[n] = {}, load(first + n * blockDim.x, to[n]);
        };
        if (n_cols % 4) {
            each([&](u32 i, float4& to) INLINE { to = ragged_quad(from, i, n_cols, bf16); });
        } else if (bf16) {
            each([&](u32 i, float4& to) INLINE {
                if (4 * i < n_cols) asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(to.x), "=f"(to.y) : "l"((const uint2*)from + i));
            });
        } else {
            each([&](u32 i, float4& to) INLINE {
                if (4 * i < n_cols) asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(to.x), "=f"(to.y), "=f"(to.z), "=f"(to.w) : "l"((const float4*)from + i));
            });
        }
    }
    template <u32 N>
    __device__ __forceinline__ void ask_weights(u32 first, float4 (&to)[N]) const {
#pragma unroll
        for (u32 n = 0; n < N; n++) to[n] = {1, 1, 1, 1};
        if (norm) ask(norm, false, first, to);
    }
    __device__ __forceinline__ float4 numbers(float4 v) const { return bf16 && n_cols % 4 == 0 ? widened(v) : v; }
    static __device__ __forceinline__ float4 widened(float4 v) {
        const float2 low = widen(__float_as_uint(v.x)), high = widen(__float_as_uint(v.y));
        return {low.x, low.y, high.x, high.y};
    }
    static __device__ __forceinline__ float4 times(float4 v, float4 w) { return {v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w}; }
    __device__ __forceinline__ float4 count(float4 v, float4 w) {
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        v = times(v, w);
        auto at_least = [&](float v) { asm("max.NaN.f32 %0, %0, %1;" : "+f"(most) : "f"(fabsf(v))); };
        at_least(v.x), at_least(v.y), at_least(v.z), at_least(v.w);
        return v;
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
        if (kept) {
            first = for_kept([&](u32 i, auto bf16) INLINE {
                float4 w[1];
                ask_weights(i, w);
                if constexpr (holds(bf16)) {
                    const float2 v = ((const float2*)kept)[i];
                    f(i, widened({v.x, v.y}), w[0]);
                } else {
                    f(i, ((const float4*)kept)[i], w[0]);
                }
            });
        }
        for (; first < n_quads; first += TOGETHER * blockDim.x) {
            float4 v[TOGETHER], w[TOGETHER];
            ask(x, bf16, first, v), ask_weights(first, w);
#pragma unroll
            for (u32 t = 0; t < TOGETHER; t++) {
                if (first + t * blockDim.x < n_quads) f(first + t * blockDim.x, numbers(v[t]), w[t]);
            }
        }
    }
    // Reads all; afterwards `most` is the block's, and with a norm `squares` is.
    __device__ __forceinline__ void read() {
        __shared__ float all_squares[32];
        __shared__ u32 all_most[32];
#pragma unroll
        for (u32 h = 0; h < HELD; h++) held[h] = count(numbers(held[h]), held_weights[h]);
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
#pragma unroll
        for (u32 h = 0; h < HELD; h++) {
            const u32 i = threadIdx.x + h * blockDim.x;
            if (i < n_quads) put(i, count(numbers(held[h]), held_weights[h]));
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
