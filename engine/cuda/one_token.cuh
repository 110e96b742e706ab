// Products with one token: a sink of the decoder, and the reader of matrices that are not encoded.
#pragma once
#include "activations.cuh"
#include "launch.cuh"
#include "values.cuh"

constexpr u32 GROUP = 128;  // columns

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
    template <class Input>
    __device__ __forceinline__ void prepare(const Launch& launch, Input& input, u8* shared) {
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
