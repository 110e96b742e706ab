// The decoder of docs/format.md, sections 5 to 7: one warp decodes one block, lane = row, and hands each lane's codes to
// a sink, four columns at a time.
//
// What bounds it on Hopper is the number of integer instructions a step, of which the ALU pipe takes one warp's in two
// cycles. So shifts and sums that a multiply-add can do go to the other pipe, and an entry of the table holds the parts
// where the codes want them. docs/kernel-notes.md has the measurements.
//
// In bounds on any payload: table look-ups by T bits, words from a ring in shared memory whose pointer wraps.
#pragma once
#include "tensor_cores.cuh"
#include <type_traits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using i32 = int32_t;
using u64 = unsigned long long;
using i64 = long long;

constexpr int BF16 = 0, FP8 = 1, INT8 = 2;  // the header's numbers
constexpr int ANY = -1;                     // a parameter that the tensor's description holds, not the kernel's type
constexpr u32 FULL = 0xffffffff;

// A tensor in device memory. engine/src/cuda/encoded/matrix.rs has the same structure. Small, like all parameters: a kernel waits for each line of them that it reads.
struct Matrix {
    const uint2* table;        // [2^T], 16-byte aligned: see Codec::assemble and step
    const u8* stream;          // 16-byte aligned
    const u32* offsets;        // [n_blocks + 1], in units of 16 bytes
    const u32* raw;            // [row block][unit][k][32]
    const u32* patch_offsets;  // [n_blocks + 1], or null
    const u32* patches;
    const void* scales;
    u32 n_rows, n_cols, block_cols, n_col_blocks, n_units;
    u32 per_row;  // 2^32 / n_col_blocks, rounded up; 0 where that is 1
    u32 table_bits, scale_kind;
    i32 bias;
    u32 filler;  // the code that a patched weight stands as
    u8 parts_per_symbol, raw_bits, part_bits;
    u8 trellis;  // whether codes are those of a trellis

    // Whole row blocks in so many blocks: a multiplication, for divisions take long where warps begin.
    __device__ __forceinline__ u32 rows_in(u32 blocks) const { return per_row ? __umulhi(blocks, per_row) : blocks; }
};

// Bits of `a` where the mask has them, of `b` elsewhere. As C++ it would become two operations.
__device__ __forceinline__ u32 select(u32 mask, u32 a, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}
// Shifts by constants, on the multiply-add pipe.
__device__ __forceinline__ u32 shift_right(u32 v, int n) { return n == 0 ? v : __umulhi(v, 1u << (32 - n)); }
__device__ __forceinline__ u32 shift(u32 v, int left) { return left >= 0 ? v * (1u << left) : shift_right(v, -left); }
__device__ __forceinline__ u32 bytes(u32 b) { return b * 0x01010101u; }
// The sign bit of every byte, spread over the byte.
__device__ __forceinline__ u32 spread_signs(u32 v) { return prmt(v, 0, 0xba98); }

__device__ __forceinline__ u32 shared_u16(u32 at) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
    return v;
}
__device__ __forceinline__ uint2 shared_uint2(u32 at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
}
// For lambdas whose captures have to stay in registers.
#define INLINE __attribute__((always_inline))

// A condition that is known where the code is compiled, or only at run time.
template <bool B>
__device__ __forceinline__ constexpr bool holds(std::bool_constant<B>) { return B; }
__device__ __forceinline__ bool holds(bool b) { return b; }

// The same value, of which the compiler does not know that: what is derived from it is computed where it is needed, rather than once before a
// loop whose registers it would then take.
__device__ __forceinline__ u32 again(u32 v) {
    asm volatile("" : "+r"(v));
    return v;
}

// The same value, of which the compiler knows that all lanes have it, and keeps it in a uniform register.
__device__ __forceinline__ u32 uniform(u32 v) { return __shfl_sync(FULL, v, 0); }

// Four columns of a lane's row. 8-bit formats: `a` has the four codes. bf16: `a` has codes 0 and 1, `b` 2 and 3.
struct Quad {
    u32 a, b;
};

// How codes come from entries and raw words. With G or K ANY, from the symbols by the book.
template <int FORMAT, int G_, int K_, bool TRELLIS_ = false>
struct Codec {
    static constexpr int G = G_, K = K_, N_RAW = K > 0 ? K : 1;
    static constexpr bool FIXED = K != ANY, TRELLIS = TRELLIS_;

    // Field of width F: its word and its bit for quad `q`, its lowest bit in the raw number.
    static __device__ constexpr int below(int width) {  // bits of the fields wider than `width`
        int n = 0;
        for (int f = 8; f > width; f >>= 1) n += K & f;
        return n;
    }

    // A quad's raw bits `first` to `end` (of the raw number) at bit `to` of the bytes; other bits of `onto` stay.
    static __device__ __forceinline__ u32 gather(const u32 (&raw)[N_RAW], int q, int first, int end, int to, u32 onto) {
#pragma unroll
        for (int f = 8; f >= 1; f >>= 1) {
            if (!(K & f)) continue;
            const int at = below(f), lo = at > first ? at : first, hi = at + f < end ? at + f : end;
            if (lo >= hi) continue;
            const int from = q * f % 8 + lo - at;
            onto = select(bytes(((1u << (hi - lo)) - 1) << (to + lo - first)), shift(raw[at + q * f / 8], to + lo - first - from), onto);
        }
        return onto;
    }

    // The signs of a quad, at the top bits of its bytes; other bits are garbage.
    static __device__ __forceinline__ u32 signs(const u32 (&raw)[N_RAW], int q) {
        constexpr int f = K & -K;  // the last field
        return shift(raw[below(f) + q * f / 8], 7 - (q * f % 8 + f - 1));
    }

    // Entries `y` of the unit's steps -> quad q. The parts of an entry stand where the code has them (bf16 with G = 4 and k >= 9: in
    // the high byte; k = 8: rotated right by one from bit 8), G = 8: those of the second quad a bit lower, or with k = 4 at the top.
    static __device__ __forceinline__ Quad assemble(const u32* y, const u32 (&raw)[N_RAW], int q) {
        u32 parts;
        if constexpr (G == 8 && K == 4) {
            // Both quads' magnitudes at once, in the halves of the bytes where their raw bits are. With a trellis, whose codes have seven bits, each for
            // itself, for then what is left of the other is in the eighth.
            const u32 both = select(bytes(!TRELLIS ? 0x77 : q & 1 ? 0x70 : 0x07), raw[q / 2], y[q / 2]);
            const u32 magnitude = shift(both, q & 1 ? -4 : 0) & (TRELLIS ? FULL : bytes(0x0f));
            return {magnitude ^ spread_signs(signs(raw, q)), 0};
        } else if constexpr (FORMAT != BF16) {
            if constexpr (G == 8) parts = q & 1 ? y[q / 2] * 2 : y[q / 2];
            if constexpr (G == 4) parts = y[q];
            if constexpr (G == 2) parts = prmt(y[2 * q], y[2 * q + 1], 0x5410);
            if constexpr (G == 1) parts = prmt(prmt(y[4 * q], y[4 * q + 1], 0x0040), prmt(y[4 * q + 2], y[4 * q + 3], 0x0040), 0x5410);
            if constexpr (K == 0) return {parts, 0};
            u32 t = gather(raw, q, 0, K - 1, 0, parts);
            if constexpr (FORMAT == FP8) return {select(bytes(0x80), signs(raw, q), t), 0};
            if constexpr (G == 8) t &= bytes((1u << K) - 1);
            return {t ^ spread_signs(signs(raw, q)), 0};
        } else if constexpr (G == 4) {
            u32 low, high;
            if constexpr (K == 8) {
                high = select(bytes(0x80), raw[q], y[q]);
                low = select(bytes(0x80), y[q], raw[q]);
            } else {
                low = raw[q];
                high = select(bytes(0x80), signs(raw, q), gather(raw, q, 8, K - 1, 0, y[q]));
            }
            return {prmt(low, high, 0x5140), prmt(low, high, 0x7362)};
        } else {
            const u32 low = gather(raw, q, 0, K < 9 ? K - 1 : 8, 0, 0);
            u32 high = signs(raw, q);
            if constexpr (K > 9) high = gather(raw, q, 8, K - 1, 0, high);
            const u32 mask = 0x00010001u * (0x8000 | ((1u << (K - 1)) - 1));
            const u32 y0 = G == 2 ? y[2 * q] : prmt(y[4 * q], y[4 * q + 1], 0x5410);
            const u32 y1 = G == 2 ? y[2 * q + 1] : prmt(y[4 * q + 2], y[4 * q + 3], 0x5410);
            return {select(mask, prmt(low, high, 0x5140), y0), select(mask, prmt(low, high, 0x7362), y1)};
        }
    }
};

// Any valid parameters: `symbols` of the quad's parts (the entry's y), raw words read where they lie.
template <int FORMAT>
__device__ __noinline__ Quad assemble_any(const Matrix& m, u64 parts, const u32* unit_raw, u32 q) {
    const u32 k = m.raw_bits, w = m.part_bits, low_bits = k ? k - 1 : 0;
    u32 codes[4];
    for (u32 i = 0; i < 4; i++) {
        u32 r = 0, done = 0;
        for (u32 f = 8; f; f >>= 1) {
            if (!(k & f)) continue;
            const u32 word = unit_raw[(done + q * f / 8) * 32];
            r |= (word >> (8 * i + q * f % 8) & ((1u << f) - 1)) << done;
            done += f;
        }
        const u32 part = (u32)(parts >> (w * i)) & ((1u << w) - 1);
        const bool negative = k && (r >> low_bits & 1);
        const u32 magnitude = (u32)m.bias + (part << low_bits) + (r & ((1u << low_bits) - 1));
        if (FORMAT == INT8) codes[i] = (negative ? ~magnitude : magnitude) & 0xff;
        if (FORMAT == FP8) codes[i] = (magnitude | (negative ? 0x80 : 0)) & 0xff;
        if (FORMAT == BF16) codes[i] = (magnitude | (negative ? 0x8000 : 0)) & 0xffff;
    }
    if (FORMAT == BF16) return {codes[0] | codes[1] << 16, codes[2] | codes[3] << 16};
    return {codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24, 0};
}

// With a trellis (codec/src/trellis.rs): the grids that a row's next quad and the one after it are on, one bit a column, as far as that is known.
// Zeros where a block begins.
struct Grids {
    u32 now = 0, next = 0;

    // What the quad's codes stand for.
    __device__ __forceinline__ Quad values(Quad codes) {
        // Codes have seven bits. Without the eighth, twice a code stays in its byte, so that a multiply-add does; and the mask is part of the
        // operation that sets the sign, if the parity is taken from what that leaves.
        const u32 code = again(codes.a & bytes(0x7f)), grid = now;
        now = next ^ (code & bytes(1)), next = grid;
        return {code * 2 + grid, 0};
    }
};

// An offset, asked for here even where it is needed much later.
__device__ __forceinline__ u32 offset_at(const Matrix& m, u32 block) {
    u32 offset;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(offset) : "l"(m.offsets + block));
    return offset;
}

// Where the streams of the blocks from `block` to `end` lie, in units of 16 bytes.
struct Stream {
    u32 begin, end;
    Stream() = default;
    __device__ __forceinline__ Stream(const Matrix& m, u32 block, u32 end) : begin(offset_at(m, block)), end(offset_at(m, end)) {}
};

constexpr u32 CHUNK = 512;
// Chunks that a warp asks for where it begins. All do so at once, and what they ask for comes after what others asked for before: so as little as will do.
constexpr u32 FIRST_CHUNKS = 2;
// What the last step of a block may read of the next one's words: one a lane.
constexpr u32 OVERRUN = 64;

// A warp's window on the streams of consecutive blocks: three or four chunks of 512 bytes, and the first again behind the last, so that reads that begin
// within the ring need not wrap.
template <u32 CHUNKS>
struct Reader {
    static constexpr u32 RING = CHUNKS * CHUNK, BYTES = RING + CHUNK;
    u32 x;      // state in the top T bits, then the bits that wait, then zeros
    u32 scale;  // 2^(16 − T + bits consumed mod 16): what brings a word behind the bits that wait
    u32 next;   // shared address of the next word; the same in all lanes
    u32 limit;  // where the next chunk goes, before wrapping
    u32 ring;
    u32 fetched, n_bytes;
    const u8* source;
    u32 to_top, state_mask, refill_at, lanes_below;

    // Asks for the next chunk.
    __device__ __forceinline__ void fetch(u32 lane) {
        if (fetched < n_bytes) {
            const u32 to = (limit >= ring + RING ? limit - RING : limit) + lane * 16;
            copy_async(to, source);
            if (to < ring + CHUNK) copy_async(to + RING, source);
        }
        source += CHUNK, fetched += CHUNK, limit += CHUNK;
    }

    // Asks for the first bytes of a stream. Four groups of copies, some of which are empty.
    __device__ __forceinline__ void open(const Matrix& m, Stream stream, u32 ring_, u32 lane_) {
        const u32 lane = again(lane_);
        n_bytes = (stream.end - stream.begin) * 16;
        source = m.stream + (u64)stream.begin * 16 + lane * 16;
        fetched = lane * 16;
        ring = limit = again(ring_);
#pragma unroll 1
        for (int i = 0; i < 4; i++) {
            if (i < FIRST_CHUNKS) fetch(lane);
            commit_copies();
        }
        next = ring;
    }

    // The lanes' states in the first block, once they are there.
    __device__ __forceinline__ void begin(const Matrix& m, u32 lane) {
        to_top = 32 - m.table_bits, state_mask = ~0u << to_top, refill_at = 1u << to_top;
        lanes_below = (1u << lane) - 1;
        wait_copies<3>();
        __syncwarp();
        begin_block(lane);
    }
    __device__ __forceinline__ void begin_block(u32 lane) {
        x = shared_u16(next + 2 * lane) << 16;
        scale = 1 << 16;
        next += 64;
    }

    // On to `block`, the one behind that which was decoded last; its stream begins at 16 · `offset`. That is near `next`, but not there: what pads
    // the stream was not read, while the last step may have read words that are not its block's.
    __device__ __forceinline__ void go_on(const Matrix& m, u32 block, u32 end, u32 offset, u32 lane) {
        const u32 ahead = (u32)(source - m.stream) - lane * 16 - offset * 16;  // what was asked for and is not decoded
        if (ahead <= RING) {
            next = limit - ahead;
            if ((i32)(next - ring) < 0) next += RING, limit += RING;
        } else {
            // A stream with more or fewer words than its block takes, as no encoder makes it.
            wait_copies<0>();
            __syncwarp();
            open(m, Stream(m, block, end), ring, lane);
        }
        refresh(lane);
        begin_block(lane);
    }

    // To be called before every eighth step at the latest, for eight read no more than 448 bytes (T is at most 14), which are there afterwards.
    __device__ __forceinline__ void refresh(u32 lane) {
        constexpr u32 FULL_ENOUGH = RING - CHUNK - OVERRUN, ON_THEIR_WAY = CHUNKS - 2;
        static_assert(FULL_ENOUGH >= ON_THEIR_WAY * CHUNK + 448);
        __syncwarp();
        if (next >= ring + RING) next -= RING, limit -= RING;
        if (limit - next <= FULL_ENOUGH) fetch(lane);
        commit_copies();
        wait_copies<ON_THEIR_WAY>();
        __syncwarp();
    }

    // One step: returns the entry's parts. The table lies at the start of shared memory, at address `table`.
    __device__ __forceinline__ u32 step(u32 table) {
        const uint2 entry = shared_uint2(table + (x >> to_top) * 8);
        const u32 power = __funnelshift_l(0, 1, entry.x);  // 2^nb, nb being the lowest five bits
        x = x * power + (entry.x & state_mask);
        scale *= power;
        // One piece, so that the comparison stays a predicate from the vote to the refill.
        u32 refilling;
        asm volatile(
            "{.reg .pred refill; .reg .u32 at, word; .reg .u16 half;"
            "setp.ge.u32 refill, %1, %5;"
            "vote.sync.ballot.b32 %2, refill, -1;"
            "and.b32 at, %2, %4; popc.b32 at, at; mad.lo.u32 at, at, 2, %3;"
            "ld.shared.u16 half, [at]; cvt.u32.u16 word, half;"
            "@refill mul.hi.u32 %1, %1, 65536;"
            "@refill mad.lo.u32 %0, word, %1, %0;}"
            : "+r"(x), "+r"(scale), "=&r"(refilling)
            : "r"(next), "r"(lanes_below), "r"(refill_at));
        next += 2 * __popc(refilling);
        return entry.y;
    }
};

using ProductReader = Reader<4>;
constexpr u32 RING_BYTES = ProductReader::BYTES;

// A block's raw bits.
__device__ __forceinline__ const u32* raw_of(const Matrix& m, u32 i, u32 j) { return m.raw + (u64)(i * m.n_units + j * (m.block_cols / 32)) * m.raw_bits * 32; }

// Brings a block's first raw bits as near as the L2 cache: those of UNITS, or, if that is more, `most` words a lane.
template <u32 UNITS = 2>
__device__ __forceinline__ void prefetch_raw(const Matrix& m, u32 i, u32 j, u32 lane, u32 most) {
    const u32 units = m.block_cols / 32, lines = min(min(units, m.n_units - j * units) * m.raw_bits, max(most, UNITS * m.raw_bits));
    const u32* raw = raw_of(m, i, j);
    for (u32 l = lane; l < lines; l += 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(raw + l * 32));
}

// Asks for the table to be copied to shared memory, by `n_threads` threads of which this is `thread`: one group of copies.
__device__ __forceinline__ void copy_table(const Matrix& m, u32 table, u32 thread, u32 n_threads) {
    for (u32 i = thread; i < 1u << (m.table_bits - 1); i += n_threads) copy_async(table + i * 16, m.table + 2 * i);
    commit_copies();
}

// Units of `n_blocks` blocks from column block j on.
__device__ __forceinline__ u32 units_of(const Matrix& m, u32 j, u32 n_blocks) {
    const u32 units_per_block = m.block_cols / 32, n_rows = m.rows_in(j + n_blocks), in_last = j + n_blocks - n_rows * m.n_col_blocks;
    return n_rows * m.n_units + in_last * units_per_block - j * units_per_block;
}

// Decodes `n_blocks` blocks of `n_units` units from column block j of row block i on, which `reader` has opened, and calls sink.quad(unit, q, quad, whole)
// for all their quads (those of a last, partial unit included, which is not whole), sink.end_unit(unit) after each unit of 32 columns, begin_block(i, j) and
// end_block() around each block, and end_row(i) after the last block of a row block, or of all.
template <int FORMAT, class C, u32 CHUNKS, class Sink>
__device__ __forceinline__ void decode_blocks(const Matrix& m, Reader<CHUNKS>& reader, u32 table, u32 lane, u32 i, u32 j, u32 n_blocks, u32 n_units, Sink& sink) {
    const u32 units_per_block = m.block_cols / 32, first_unit = i * m.n_units + j * units_per_block, end = i * m.n_col_blocks + j + n_blocks;
    u32 block = end - n_blocks, rest = n_units;  // that are left
    const u32 k = C::FIXED ? (u32)C::K : m.raw_bits;
    const u32* raw_next = m.raw + (u64)first_unit * k * 32 + lane;
    constexpr u32 AHEAD = Sink::WRITES == 1 ? 3 : 1;  // units whose raw bits are loaded before their turn
    u32 raw[C::N_RAW], ahead[AHEAD][C::N_RAW];
    auto load_raw = [&](const u32* from, u32 (&to)[C::N_RAW]) INLINE {
#pragma unroll
        for (int b = 0; b < C::K; b++) to[b] = __ldcs(from + 32 * b);
    };
    if constexpr (C::FIXED) {
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) load_raw(raw_next + (a < n_units ? a : 0) * 32 * C::K, ahead[a]);
    }
    reader.begin(m, lane);
#pragma unroll 1
    for (;;) {
        // The next block's, loaded here for it to be there when it is needed.
        const u32 offset = offset_at(m, block + 1);
        const u32 before = j * units_per_block, units = min(units_per_block, m.n_units - before), n_whole = min(units, m.n_cols / 32 - before);
        sink.begin_block(i, j);
        Grids grids;
        auto values = [&](Quad codes) INLINE { return C::TRELLIS ? grids.values(codes) : codes; };
        if constexpr (C::FIXED) {
            constexpr int STEPS = 32 / C::G;
            // Units in the loop's body, and units whose raw bits are prefetched at once: with a trellis there is no register for that.
            constexpr u32 TOGETHER = C::G == 8 && Sink::WRITES < 2 ? 2 : 1, AT_ONCE = C::TRELLIS ? 1 : TOGETHER;
            // Units of raw bits on their way to the L2 cache. Those that are loaded ahead cover device memory's latency where a unit has eight steps, but not
            // the waits behind what a launch writes. With eight of them, it would drive them from the cache before their turn.
            constexpr u32 PREFETCH = Sink::WRITES ? 4 : C::G == 8 ? 2 : 0;
            auto unit = [&](u32 u, auto whole) {
#pragma unroll
                for (int b = 0; b < C::K; b++) {
                    raw[b] = ahead[0][b];
#pragma unroll
                    for (u32 a = 1; a < AHEAD; a++) ahead[a - 1][b] = ahead[a][b];
                }
                raw_next += 32 * C::K;
                if (PREFETCH && u % AT_ONCE == 0 && lane < AT_ONCE * C::K && u + PREFETCH + (lane >= C::K) < rest) {
                    asm volatile("prefetch.global.L2 [%0];" ::"l"(raw_next + (PREFETCH - 1) * 32 * C::K + 31 * lane));
                }
                // Always, if only the same again, so that nothing chooses between what is loaded and what is not, and waits for it. Where two units are
                // unrolled, after the first use of what was loaded before: one scoreboard may count all loads, and that use would wait for these, too.
                auto load_next = [&]() INLINE { load_raw(u + AHEAD < rest ? raw_next + (AHEAD - 1) * 32 * C::K : raw_next - 32 * C::K, ahead[AHEAD - 1]); };
                if (C::G != 8) load_next();
                if (STEPS >= 8 || u % 2 == 0) reader.refresh(lane);
                u32 y[STEPS];
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    if (s > 0 && s % 8 == 0) reader.refresh(lane);
                    y[s] = reader.step(table);
                    if (C::G == 8) {
                        sink.quad(u, 2 * s, values(C::assemble(y, raw, 2 * s)), whole);
                        sink.quad(u, 2 * s + 1, values(C::assemble(y, raw, 2 * s + 1)), whole);
                    } else if ((s + 1) * C::G % 4 == 0) {
                        sink.quad(u, s * C::G / 4, values(C::assemble(y, raw, s * C::G / 4)), whole);
                    }
                    if (C::G == 8 && s == Sink::LOADS_AFTER) {
                        // Where nothing else keeps the compiler from it, it would move the loads up, before that use.
                        if (Sink::LOADS_AFTER) __syncwarp();
                        load_next();
                    }
                }
                sink.end_unit(u);
            };
            // What takes codes as they are can take those behind the last column, too: the activations there are zeros.
            const u32 stop = Sink::MASKS ? n_whole : units;
#pragma unroll TOGETHER
            for (u32 u = 0; u < stop; u++) unit(u, std::true_type());
            if (Sink::MASKS && stop < units) unit(stop, std::false_type());
        } else {
            const u32 g = m.parts_per_symbol, w = m.part_bits;
            u64 parts = 0;
            u32 have = 0, since_refresh = 8;
#pragma unroll 1
            for (u32 u = 0; u < units; u++) {
                Quad quads[8];
#pragma unroll
                for (int q = 0; q < 8; q++) {
                    while (have < 4) {
                        if (since_refresh == 8) reader.refresh(lane), since_refresh = 0;
                        parts |= (u64)reader.step(table) << (w * have);
                        have += g, since_refresh++;
                    }
                    quads[q] = assemble_any<FORMAT>(m, parts, raw_next, q);
                    if (FORMAT == INT8 && m.trellis) quads[q] = grids.values(quads[q]);
                    parts >>= 4 * w, have -= 4;
                    sink.quad(u, q, quads[q], u < n_whole);
                }
                raw_next += 32 * k;
                sink.end_unit(u);
            }
        }
        sink.end_block();
        const bool ends = ++j == m.n_col_blocks;
        if (ends) j = 0, i++;
        if (++block == end) break;
        if (ends) sink.end_row(i - 1);
        rest -= units;
        reader.go_on(m, block, end, offset, lane);
    }
    sink.end_row(i - (j == 0));
    wait_copies<0>();
}

// The same in two parts, for codes with parts of one bit, eight a symbol: what depends on the stream, before the activations are known, and what depends on
// them. Between them the parts of a unit stand in `parts`, a word a lane, those of step s at bits 2s (second quad) and 2s + 1 (first) of its bytes, or with
// k = 4 at bits s (first) and s + 4; and the block's first raw bits, RING_BYTES of them, where its stream was.
__device__ __forceinline__ void decode_parts(const Matrix& m, ProductReader& reader, u32 table, u32 lane, u32 i, u32 j, u32 units, u32 parts) {
    reader.begin(m, lane);
    const u32 stride = m.raw_bits == 4 ? 1 : 2, place = m.raw_bits - stride;
#pragma unroll 2
    for (u32 u = 0; u < units; u++) {
        if (u % 2 == 0) reader.refresh(lane);
        u32 word = 0;
#pragma unroll
        for (int s = 0; s < 4; s++) word += (reader.step(table) >> place) << (stride * s);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(parts + u * 128 + lane * 4), "r"(word) : "memory");
    }
    wait_copies<0>();
    __syncwarp();
    const u32 bytes = min(units * m.raw_bits * 128, RING_BYTES);
    const u8* from = (const u8*)raw_of(m, i, j);
    for (u32 at = lane * 16; at < bytes; at += 512) copy_async(reader.ring + at, from + at);
    commit_copies();
}

template <class C, class Sink>
__device__ __forceinline__ void finish_parts(const Matrix& m, u32 lane, u32 i, u32 j, u32 units, u32 parts, u32 ring, Sink& sink) {
    static_assert(C::G == 8 && C::FIXED);
    // Units whose raw bits are in shared memory, and how many of the others' are on their way.
    constexpr u32 THERE = RING_BYTES / (128 * C::K), AHEAD = C::K < 5 ? 3 : 2;
    const u32* from = raw_of(m, i, j) + THERE * C::K * 32 + lane;
    u32 ahead[AHEAD][C::N_RAW];
    Grids grids;
    auto load = [&](u32 u, u32 (&to)[C::N_RAW]) INLINE {
        if (u >= units) return;
#pragma unroll
        for (int b = 0; b < C::K; b++) to[b] = __ldcs(from + b * 32);
        from += C::K * 32;
    };
    auto unit = [&](u32 u, const u32 (&raw)[C::N_RAW]) INLINE {
        u32 word, y[4];
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(parts + u * 128 + lane * 4));
#pragma unroll
        for (int s = 0; s < 4; s++) y[s] = shift(word, C::K == 4 ? 3 - s : C::K - 2 - 2 * s) & (C::K == 4 && C::TRELLIS ? bytes(0x88) : FULL);
#pragma unroll
        for (int q = 0; q < 8; q++) {
            const Quad codes = C::assemble(y, raw, q);
            sink.quad(u, q, C::TRELLIS ? grids.values(codes) : codes, std::true_type());
        }
        sink.end_unit(u);
    };
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) load(THERE + a, ahead[a]);
    wait_copies<0>();
    __syncwarp();
#pragma unroll 1
    for (u32 u = 0; u < min(units, THERE); u++) {
        u32 raw[C::N_RAW];
#pragma unroll
        for (int b = 0; b < C::K; b++) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(raw[b]) : "r"(ring + (u * C::K + b) * 128 + lane * 4));
        unit(u, raw);
    }
#pragma unroll 1
    for (u32 first = THERE; first < units; first += AHEAD) {
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            if (first + a >= units) break;
            unit(first + a, ahead[a]);
            load(first + a + AHEAD, ahead[a]);
        }
    }
    __syncwarp();
}
