// Products on the tensor cores: sinks of the decoder that leave tiles in shared memory, and what multiplies those.
#pragma once
#include "launch.cuh"
#include "values.cuh"

constexpr u32 BLOCK_UNITS = 8;  // of a block that is decoded to tiles (BlockSink), at most

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
