// Kernels on encoded tensors: decode to codes or to BF16, gather rows, and products with 1 to 16 tokens.
//
// Each is one decoder (decode.cuh) with another sink (rows.cuh, one_token.cuh, tiles.cuh). A launch takes several tensors, each of which gets a share of the
// thread blocks, and so loads its table once a thread block; the warps go over its blocks.
#include "activations.cuh"
#include "launch.cuh"
#include "one_token.cuh"
#include "rows.cuh"
#include "tiles.cuh"

constexpr u32 SCRATCH_BYTES = 256;  // of a warp that multiplies, behind its ring
constexpr u32 MAX_ROWS = 128;  // row blocks of a thread block that multiplies

extern __shared__ __align__(1024) u8 shared_memory[];

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

// The end of products: once all warps have left their sums in the slots, the row blocks and tokens are shared out anew. All threads have one. SCALED: whether
// rows have scales, which plain ones do not.
template <int FORMAT, u32 ROWS, bool ONE, bool SCALED = true>
struct Ending {
    static constexpr u32 SLOT = ONE ? ROWS : TOKEN_ROWS;
    const Launch& launch;
    const Task& task0;
    const Task& task1;
    const Cut (&cuts)[2];
    const u32 lane, n_tokens, n_rows;
    u32 item;
    float scale0, scale1, sum;

    __device__ __forceinline__ Ending(const Launch& launch, const Task& task, const Cut (&cuts)[2])
        : launch(launch), task0(launch.gated ? launch.tasks[0] : task), task1(launch.tasks[1]), cuts(cuts), lane(threadIdx.x % ROWS),
          n_tokens(ONE ? 1 : launch.n_tokens), n_rows(task0.matrix.n_rows), item(threadIdx.x / ROWS) {}
    __device__ __forceinline__ u32 n_items() const { return cuts[0].n_rows * n_tokens; }
    __device__ __forceinline__ u32 row() const { return (cuts[0].first_row + item / n_tokens) * ROWS + lane; }
    __device__ __forceinline__ u64 place() const { return (u64)(item % n_tokens) * n_rows + row(); }
    // Asks for what the item's sums are worth, and what they are added to: before they are there.
    __device__ __forceinline__ void ask() {
        const bool has_row = item < n_items() && row() < n_rows;
        scale0 = !SCALED ? 1 : has_row ? scale_of<FORMAT>(task0.matrix, row()) : 0;
        scale1 = !SCALED ? 1 : has_row && launch.gated ? scale_of<FORMAT>(task1.matrix, row()) : 0;
        sum = has_row && task0.adds ? ((const float*)task0.out)[place()] : -0.0f;
    }
    // The slots are at `slots`, those of a second, gated product `slots_bytes` behind. unit_of(token): what a token's sums are worth.
    template <class Unit>
    __device__ __forceinline__ void put_out(u32 slots, u32 slots_bytes, u32 paired, Unit unit_of) {
        double unit = ONE ? 0 : unit_of(item % n_tokens);
        if (paired) arrive_cluster(), wait_cluster();
        __syncthreads();
        while (item < n_items()) {
            const u32 r = item / n_tokens, token = item % n_tokens;
            if (ONE) unit = unit_of(token);
            float y = add_up<FORMAT, ROWS, SLOT>(launch, task0, cuts[0], slots, r, token, n_tokens, row(), scale0, unit);
            if (launch.gated) y = add_up<FORMAT, ROWS, SLOT>(launch, task1, cuts[1], slots + slots_bytes, r, token, n_tokens, row(), scale1, unit) * (y / (1 + expf(-y)));
            if (row() < n_rows) {
                if (launch.bf16) ((__nv_bfloat16*)task0.out)[place()] = __float2bfloat16_rn(y);
                else ((float*)task0.out)[place()] = sum + y;
            }
            item += blockDim.x / ROWS;
            ask();
            if (!ONE) unit = unit_of(item % n_tokens);
        }
    }
};

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
            prefetch_raw<FORMAT == BF16 ? 1 : 2>(m, i, j, lane, launch.raw_words);
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
    Input<2, WAY == PLAIN ? 2 : 1> input(launch.x, launch.norm, launch.bf16, m.n_cols);
    wait_for_previous();
    if (WAY == ENCODED) start_next();
    input.ask_held();
    sink.prepare(launch, input, shared_memory + slots_at + n_teams * slots_bytes);
    if constexpr (WAY == ENCODED) wait_for_table(n_blocks);
    if (paired) wait_cluster();
    __syncthreads();
    Ending<FORMAT, ROWS, true, WAY != PLAIN> ending(launch, task, cuts);
    if (WAY == PLAIN) ending.ask();  // there are registers for it
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
    if (WAY != PLAIN) ending.ask();
    ending.put_out(shared + slots_at, slots_bytes, paired, [&](u32) INLINE { return sink.unit(); });
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
    Ending<FORMAT, 32, false> ending(launch, task, cuts);
    ending.ask();
    ending.put_out(windows, slots_bytes, 0, [&](u32 token) INLINE { return FORMAT == INT8 ? launch.units[token] : 1; });
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
    Input<2, 1> input(launch.x, EIGHTS ? nullptr : launch.norm, launch.bf16, EIGHTS ? 0 : m.n_cols);
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
        input.ask_held();
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
// own, several times slower. engine/src/cuda/encoded/matrix.rs has the same list.
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

    __device__ __forceinline__ Input<2, 1> input() const {
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
    input.ask_held();
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
    input.ask_held();
    input.keep(shared_memory, dynamic_bytes());
    input.read();
    input.for_each([&](u32 i, float4 v) {
        const u32 lane = token % 8 * 4 + i % 2 * 2;
        u32* to = (u32*)p.out + (((u64)(i / 4) * tiles + token / 8) * 32 + lane) * 4 + i % 4 / 2;
        const float4 low = rest(v);
        to[0] = pack(v.x, v.y), to[4] = pack(v.z, v.w), to[2] = pack(low.x, low.y), to[6] = pack(low.z, low.w);
    });
}
