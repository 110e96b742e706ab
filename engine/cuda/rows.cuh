// Sinks of the decoder: rows of a matrix, to memory.
#pragma once
#include "launch.cuh"
#include "values.cuh"

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
