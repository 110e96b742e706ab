// The operations of a forward pass other than products of encoded matrices. Each kernel takes one structure, which
// engine/src/cuda/ops.rs declares alike. Activations are f32 `[n_tokens, width]`, weights BF16, sums f32.
#include "tensor_cores.cuh"

// ---- A step's tokens -------------------------------------------------------------------------------------------------

struct BeginStep {
    const uint32_t* step_host;  // [1 + n_tokens]: the first position, then tokens; in the host's memory
    uint32_t* position;
    uint32_t* tokens;           // [n_tokens]
    uint32_t n_tokens;
};

extern "C" __global__ void begin_step(const __grid_constant__ BeginStep p) {
    wait_for_previous();
    start_next();
    if (threadIdx.x == 0) *p.position = p.step_host[0];
    for (uint32_t i = threadIdx.x; i < p.n_tokens; i += blockDim.x) p.tokens[i] = p.step_host[1 + i];
}

struct EmbedDense {
    const uint32_t* tokens;
    const __nv_bfloat16* table;  // [vocab, stride]
    float* out;                  // [n_tokens, n_cols]
    uint32_t n_cols, stride;
};

extern "C" __global__ void embed_dense(const __grid_constant__ EmbedDense p) {
    wait_for_previous();
    start_next();
    const __nv_bfloat16* row = p.table + size_t(p.tokens[blockIdx.x]) * p.stride;
    for (uint32_t i = threadIdx.x; i < p.n_cols; i += blockDim.x)
        p.out[size_t(blockIdx.x) * p.n_cols + i] = __bfloat162float(row[i]);
}

// ---- Norms and sums --------------------------------------------------------------------------------------------------

struct Normalize {
    const float* x;       // [n_tokens, n_cols]
    const float* weight;  // [n_cols], or null: no norm
    float* out;           // [n_tokens, n_cols], or null
    __nv_bfloat16* narrow;  // [n_tokens, stride], or null; zeros past n_cols
    float eps;
    uint32_t n_cols, stride;
};

// Columns 4i to 4i + 3 of a row of n_cols that begins at a multiple of so many; zeros behind the last.
__device__ __forceinline__ float4 load_quad(const float* row, uint32_t i, uint32_t n_cols) {
    if (n_cols % 4 == 0) return 4 * i < n_cols ? reinterpret_cast<const float4*>(row)[i] : float4{};
    auto at = [&](uint32_t c) { return c < n_cols ? row[c] : 0.0f; };
    return {at(4 * i), at(4 * i + 1), at(4 * i + 2), at(4 * i + 3)};
}
__device__ __forceinline__ void store_quad(float* row, uint32_t i, uint32_t n_cols, float4 v) {
    const float values[4] = {v.x, v.y, v.z, v.w};
    if (n_cols % 4 == 0 && 4 * i < n_cols) reinterpret_cast<float4*>(row)[i] = v;
    for (uint32_t c = 4 * i; n_cols % 4 && c < min(4 * i + 4, n_cols); c++) row[c] = values[c % 4];
}
__device__ __forceinline__ void store_quad(__nv_bfloat16* row, uint32_t i, float4 v) {
    reinterpret_cast<uint2*>(row)[i] = {pack(v.x, v.y), pack(v.z, v.w)};
}

// A block normalizes a token's activations, and rounds them to BF16 where that is asked for.
extern "C" __global__ void normalize(const __grid_constant__ Normalize p) {
    wait_for_previous();
    start_next();
    const float* x = p.x + size_t(blockIdx.x) * p.n_cols;
    const float4 held = load_quad(x, threadIdx.x, p.n_cols), first_weight = p.weight ? load_quad(p.weight, threadIdx.x, p.n_cols) : float4{};
    float scale = 1;
    if (p.weight) {
        float sum = 0;
        for (uint32_t i = threadIdx.x; 4 * i < p.n_cols; i += blockDim.x) {
            const float4 v = i == threadIdx.x ? held : load_quad(x, i, p.n_cols);
            sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
        scale = 1 / sqrtf(block_sum(sum) / p.n_cols + p.eps);
    }
    for (uint32_t i = threadIdx.x; 4 * i < p.stride; i += blockDim.x) {
        float4 v = i == threadIdx.x ? held : load_quad(x, i, p.n_cols);
        if (p.weight) {
            const float4 w = i == threadIdx.x ? first_weight : load_quad(p.weight, i, p.n_cols);
            v = {v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w};
        }
        if (p.out) store_quad(p.out + size_t(blockIdx.x) * p.n_cols, i, p.n_cols, v);
        if (p.narrow) store_quad(p.narrow + size_t(blockIdx.x) * p.stride, i, v);
    }
}

struct AddBias {
    float* out;         // [n_tokens, n_rows]
    const float* bias;  // [n_rows]
    uint32_t n_rows;
};

extern "C" __global__ void add_bias(const __grid_constant__ AddBias p) {
    wait_for_previous();
    start_next();
    for (uint32_t i = threadIdx.x; i < p.n_rows; i += blockDim.x) p.out[size_t(blockIdx.x) * p.n_rows + i] += p.bias[i];
}

struct SiluMul {
    float* gate;            // [n_tokens, n_cols], where the result goes
    const float* up;
    __nv_bfloat16* narrow;  // [n_tokens, stride], zeros past n_cols: where it goes instead, or null
    uint32_t n_cols, stride;
};

// blockIdx.y is the token. Each thread has a few quads, all of which it asks for at once.
extern "C" __global__ void silu_mul(const __grid_constant__ SiluMul p) {
    constexpr uint32_t QUADS = 2;
    wait_for_previous();
    start_next();
    float* gates = p.gate + size_t(blockIdx.y) * p.n_cols;
    const float* ups = p.up + size_t(blockIdx.y) * p.n_cols;
    const uint32_t first = blockIdx.x * QUADS * blockDim.x + threadIdx.x;
    float4 gate[QUADS], up[QUADS];
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++) {
        gate[q] = load_quad(gates, first + q * blockDim.x, p.n_cols);
        up[q] = load_quad(ups, first + q * blockDim.x, p.n_cols);
    }
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++) {
        const uint32_t i = first + q * blockDim.x;
        auto value = [](float g, float u) { return g * (u / (1 + expf(-g))); };
        const float4 v = {value(gate[q].x, up[q].x), value(gate[q].y, up[q].y), value(gate[q].z, up[q].z), value(gate[q].w, up[q].w)};
        if (!p.narrow) store_quad(gates, i, p.n_cols, v);
        else if (4 * i < p.stride) store_quad(p.narrow + size_t(blockIdx.y) * p.stride, i, v);
    }
}

// ---- Attention -------------------------------------------------------------------------------------------------------

struct Heads {
    const uint32_t* first_position;
    float* q;              // [n_tokens, n_heads, head_dim]
    const float* k;        // [n_tokens, n_kv_heads, head_dim]
    const float* v;
    __nv_bfloat16* keys;    // [n_kv_heads, capacity, cached_dim]
    __nv_bfloat16* values;
    const float* inverse_frequencies;  // [head_dim / 2]
    const float* query_norm;           // [head_dim], or null
    const float* key_norm;
    float query_eps, key_eps;
    uint32_t n_heads, n_kv_heads, head_dim, capacity;
};

// By how much a lane's pairs of elements are rotated: i of lane, lane + 32 and so on.
template <uint32_t PAIRS>
struct Angles {
    float sine[PAIRS], cosine[PAIRS];
    __device__ __forceinline__ Angles(const Heads& p, uint32_t position) {
#pragma unroll
        for (uint32_t n = 0; n < PAIRS; n++) {
            const uint32_t i = threadIdx.x % 32 + 32 * n;
            sincosf(i < p.head_dim / 2 ? position * p.inverse_frequencies[i] : 0, sine + n, cosine + n);
        }
    }
};

// A warp's work on a head: RMS norm, if there is one, and rotation; calls put(i, value) for each element. All that it reads is asked for at once.
template <uint32_t PAIRS, class Put>
__device__ __forceinline__ void rotate(const Heads& p, const float* x, bool is_query, const Angles<PAIRS>& by, Put put) {
    const uint32_t lane = threadIdx.x % 32, half = p.head_dim / 2;
    const float* norm = is_query ? p.query_norm : p.key_norm;
    float a[PAIRS] = {}, b[PAIRS] = {}, weights_a[PAIRS], weights_b[PAIRS];
#pragma unroll
    for (uint32_t n = 0; n < PAIRS; n++) {
        const uint32_t i = lane + 32 * n;
        weights_a[n] = weights_b[n] = 1;
        if (i < half) a[n] = x[i], b[n] = x[half + i];
        if (norm && i < half) weights_a[n] = norm[i], weights_b[n] = norm[half + i];
    }
    float scale = 1;
    if (norm) {
        float sum = 0;
#pragma unroll
        for (uint32_t n = 0; n < PAIRS; n++) sum += a[n] * a[n] + b[n] * b[n];
        scale = 1 / sqrtf(warp_sum(sum) / p.head_dim + (is_query ? p.query_eps : p.key_eps));
    }
#pragma unroll
    for (uint32_t n = 0; n < PAIRS; n++) {
        const uint32_t i = lane + 32 * n;
        if (i >= half) break;
        const float u = a[n] * (scale * weights_a[n]), v = b[n] * (scale * weights_b[n]);
        put(i, u * by.cosine[n] - v * by.sine[n]);
        put(half + i, v * by.cosine[n] + u * by.sine[n]);
    }
}

// A warp normalizes and rotates a head, in place if it is a query's, into the cache if it is a key's; values are only
// stored. blockIdx.y is the token, whose heads its blocks' warps share: a token's angles, of which it takes more than of anything else, are worked out once for a warp.
template <uint32_t DIM>
__device__ __forceinline__ void place_heads(const Heads& p) {
    wait_for_previous();
    start_next();
    const uint32_t lane = threadIdx.x % 32, position = *p.first_position + blockIdx.y, n_warps = gridDim.x * (blockDim.x / 32);
    const Angles<(DIM + 63) / 64> angles(p, position);
    for (uint32_t head = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; head < p.n_heads + 2 * p.n_kv_heads; head += n_warps) {
        const uint32_t kv_head = head < p.n_heads + p.n_kv_heads ? head - p.n_heads : head - p.n_heads - p.n_kv_heads;
        const size_t cached = (size_t(kv_head) * p.capacity + position) * DIM;
        if (head >= p.n_heads + p.n_kv_heads) {
            const float* v = p.v + (size_t(blockIdx.y) * p.n_kv_heads + kv_head) * p.head_dim;
            for (uint32_t i = lane; i < p.head_dim; i += 32) p.values[cached + i] = __float2bfloat16(v[i]);
            continue;
        }
        const bool is_query = head < p.n_heads;
        float* q = p.q + (size_t(blockIdx.y) * p.n_heads + head) * p.head_dim;
        const float* x = is_query ? q : p.k + (size_t(blockIdx.y) * p.n_kv_heads + kv_head) * p.head_dim;
        rotate(p, x, is_query, angles, [&](uint32_t i, float value) {
            if (is_query) q[i] = value;
            else p.keys[cached + i] = __float2bfloat16(value);
        });
    }
}

extern "C" __global__ void place_heads_32(const __grid_constant__ Heads p) { place_heads<32>(p); }
extern "C" __global__ void place_heads_64(const __grid_constant__ Heads p) { place_heads<64>(p); }
extern "C" __global__ void place_heads_128(const __grid_constant__ Heads p) { place_heads<128>(p); }
extern "C" __global__ void place_heads_256(const __grid_constant__ Heads p) { place_heads<256>(p); }

struct Attend {
    const uint32_t* first_position;
    const float* q;               // [n_tokens, n_heads, head_dim]
    const __nv_bfloat16* keys;    // [n_kv_heads, capacity, cached_dim], zeros past head_dim
    const __nv_bfloat16* values;
    void* out;                    // [n_tokens, stride]: of n_heads · head_dim, f32 or bf16
    uint32_t n_tokens, n_heads, n_kv_heads, head_dim, capacity, window, stride;  // window 0: none
};

constexpr uint32_t ATTEND_THREADS = 128;

// Two numbers, each the sum of two bf16 numbers.
__device__ __forceinline__ void split(float a, float b, uint32_t& high, uint32_t& low) {
    high = pack(a, b);
    const float2 rounded = widen(high);
    low = pack(a - rounded.x, b - rounded.y);
}

// Rows of DIM bf16 in shared memory, 16 bytes swizzled so that eight rows' do not conflict.
template <uint32_t DIM>
__device__ __forceinline__ uint32_t at_octet(uint32_t row, uint32_t octet) {
    return row * (DIM * 2) + ((octet ^ (DIM < 64 ? row / 2 % 4 : row % 8)) * 16);
}

// Attention of several tokens, where place_heads has been: a block takes a head and 64 or 128 tokens, from the last ones on, for these have most positions. On the
// tensor cores, with the running softmax of Milakov and Gimelshein (arXiv 1805.02867) in tiles, as FlashAttention-2 has it (Dao, arXiv 2307.08691): a warp's rows of
// scores become the operand of its values without leaving their registers. NARROW: what comes out is bf16, and so are queries and weights. Else these are the sums
// of two bf16 numbers each, so that products have 2^-17 of error, not 2^-9; keys and values are what the cache has. Shared memory: the queries, and two tiles
// each of keys and of values.
template <uint32_t DIM, bool NARROW>
__device__ __forceinline__ void attend(const Attend& p) {
    // Sixteens of rows that a warp has: all read the same keys and values from shared memory, which is what bounds it.
    constexpr uint32_t SIXTEENS = NARROW && DIM <= 128 ? 2 : 1, WARP_TOKENS = 16 * SIXTEENS, TOKENS = ATTEND_THREADS / 32 * WARP_TOKENS;
    constexpr uint32_t TILE = DIM > 128 ? 16 : DIM == 128 && NARROW ? 32 : 64 /* positions */, OCTETS = DIM / 8, STEPS = DIM / 16;
    constexpr uint32_t PARTS = NARROW ? 1 : 2, QUERY_BYTES = TOKENS * DIM * 2, TILE_BYTES = TILE * DIM * 2;
    extern __shared__ __align__(128) uint8_t tiles[];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, head_dim = p.head_dim;
    const uint32_t head = blockIdx.x, kv_head = head / (p.n_heads / p.n_kv_heads);
    const uint32_t first_token = (gridDim.y - 1 - blockIdx.y) * TOKENS, n_tokens = min(TOKENS, p.n_tokens - first_token);
    const uint32_t queries = uint32_t(__cvta_generic_to_shared(tiles)), ring = queries + PARTS * QUERY_BYTES;
    wait_for_previous();
    start_next();

    const uint32_t first_position = *p.first_position + first_token, end = first_position + n_tokens;
    const uint32_t begin = p.window && first_position + 1 > p.window ? first_position + 1 - p.window : 0;
    const uint32_t n_tiles = (end - begin + TILE - 1) / TILE;
    const size_t cached = size_t(kv_head) * p.capacity * DIM;
    // A thread copies the same octet of every few rows.
    constexpr uint32_t ROWS = ATTEND_THREADS / OCTETS;
    const uint32_t octet = threadIdx.x % OCTETS, first_row = threadIdx.x / OCTETS;
    const size_t own = cached + size_t(begin + first_row) * DIM + octet * 8;
    auto load = [&](uint32_t tile) {
        const __nv_bfloat16 *keys = p.keys + own + size_t(tile) * (TILE * DIM), *values = p.values + own + size_t(tile) * (TILE * DIM);
        const uint32_t to = ring + tile % 2 * (2 * TILE_BYTES);
#pragma unroll
        for (uint32_t r = 0; r < TILE; r += ROWS) {
            const bool there = begin + tile * TILE + first_row + r < end;
            const uint32_t at = to + at_octet<DIM>(first_row + r, octet);
            copy_async_if(there, at, keys + r * DIM);
            copy_async_if(there, at + TILE_BYTES, values + r * DIM);
        }
        commit_copies();
    };
    load(0);
    // Scores come out as powers of two.
    const float scale = rsqrtf(head_dim) * 1.44269504f;
#pragma unroll 8
    for (uint32_t row = first_row; row < TOKENS; row += ROWS) {
        const float2* q = reinterpret_cast<const float2*>(p.q + (size_t(first_token + row) * p.n_heads + head) * head_dim + octet * 8);
        uint32_t high[4], low[4];
#pragma unroll
        for (uint32_t pair = 0; pair < 4; pair++) {
            // head_dim is even
            const float2 v = row < n_tokens && octet * 8 + pair * 2 < head_dim ? q[pair] : float2{};
            split(v.x * scale, v.y * scale, high[pair], low[pair]);
        }
        const uint32_t at = at_octet<DIM>(row, octet);
        *reinterpret_cast<uint4*>(tiles + at) = {high[0], high[1], high[2], high[3]};
        if (!NARROW) *reinterpret_cast<uint4*>(tiles + QUERY_BYTES + at) = {low[0], low[1], low[2], low[3]};
    }

    // A lane has of each sixteen two rows, of tokens `row` and `row` + 8, columns lane % 4 · 2 and the next of every eight.
    const uint32_t row = warp * WARP_TOKENS + lane / 4, column = lane % 4 * 2;
    float largest[SIXTEENS][2], total[SIXTEENS][2] = {}, sums[SIXTEENS][2 * STEPS][4] = {};
#pragma unroll
    for (uint32_t m = 0; m < SIXTEENS; m++) largest[m][0] = largest[m][1] = -INFINITY;
    for (uint32_t tile = 0; tile < n_tiles; tile++) {
        load(tile + 1);
        wait_copies<1>();
        __syncthreads();
        const uint32_t keys = ring + tile % 2 * 2 * TILE_BYTES, values = keys + TILE_BYTES, start = begin + tile * TILE;
        // Whether the warp's tokens see any of these positions.
        if (start < first_position + (warp + 1) * WARP_TOKENS) {
            float scores[SIXTEENS][TILE / 8][4] = {};
#pragma unroll
            for (uint32_t step = 0; step < STEPS; step++) {
                uint32_t high[SIXTEENS][4], low[SIXTEENS][4];
#pragma unroll
                for (uint32_t m = 0; m < SIXTEENS; m++) {
                    const uint32_t at = queries + at_octet<DIM>(warp * WARP_TOKENS + m * 16 + lane % 16, step * 2 + lane / 16);
                    load_matrix(high[m], at);
                    if (!NARROW) load_matrix(low[m], at + QUERY_BYTES);
                }
#pragma unroll
                for (uint32_t n = 0; n < TILE / 16; n++) {
                    uint32_t k[4];  // of 16 positions, the first eight's two halves, then the others'
                    load_matrix(k, keys + at_octet<DIM>(n * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
                    for (uint32_t m = 0; m < SIXTEENS; m++) {
                        mma(scores[m][2 * n], high[m], k[0], k[1]), mma(scores[m][2 * n + 1], high[m], k[2], k[3]);
                        if (!NARROW) mma(scores[m][2 * n], low[m], k[0], k[1]), mma(scores[m][2 * n + 1], low[m], k[2], k[3]);
                    }
                }
            }
            if (p.window || start + TILE > first_position + warp * WARP_TOKENS + 1) {
#pragma unroll
                for (uint32_t m = 0; m < SIXTEENS; m++)
#pragma unroll
                    for (uint32_t n = 0; n < TILE / 8; n++)
#pragma unroll
                        for (uint32_t c = 0; c < 4; c++) {
                            const uint32_t at = start + n * 8 + column + c % 2, position = first_position + row + m * 16 + c / 2 * 8;
                            if (at > position || (p.window && at + p.window <= position)) scores[m][n][c] = -INFINITY;
                        }
            }
#pragma unroll
            for (uint32_t m = 0; m < SIXTEENS; m++)
#pragma unroll
                for (uint32_t i = 0; i < 2; i++) {
                    float best = largest[m][i];
#pragma unroll
                    for (uint32_t n = 0; n < TILE / 8; n++) best = fmaxf(best, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
                    best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
                    best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
                    // A token that has seen no position so far has no weights but zeros.
                    const float base = best == -INFINITY ? 0 : best, rescale = power_of_two(largest[m][i] - base);
                    if (__any_sync(~0u, best != largest[m][i])) {
                        total[m][i] *= rescale;
#pragma unroll
                        for (uint32_t n = 0; n < 2 * STEPS; n++) sums[m][n][2 * i] *= rescale, sums[m][n][2 * i + 1] *= rescale;
                    }
                    largest[m][i] = best;
#pragma unroll
                    for (uint32_t n = 0; n < TILE / 8; n++)
#pragma unroll
                        for (uint32_t c = 2 * i; c < 2 * i + 2; c++) total[m][i] += scores[m][n][c] = power_of_two(scores[m][n][c] - base);
                }
#pragma unroll
            for (uint32_t n = 0; n < TILE / 16; n++) {
                uint32_t high[SIXTEENS][4], low[SIXTEENS][4];
#pragma unroll
                for (uint32_t m = 0; m < SIXTEENS; m++)
#pragma unroll
                    for (uint32_t i = 0; i < 4; i++)
                        split(scores[m][2 * n + i / 2][i % 2 * 2], scores[m][2 * n + i / 2][i % 2 * 2 + 1], high[m][i], low[m][i]);
#pragma unroll
                for (uint32_t step = 0; step < STEPS; step++) {
                    uint32_t v[4];  // of 16 columns, the first eight's two halves of positions, then the others'
                    load_transposed(v, values + at_octet<DIM>(n * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
                    for (uint32_t m = 0; m < SIXTEENS; m++) {
                        mma(sums[m][2 * step], high[m], v[0], v[1]), mma(sums[m][2 * step + 1], high[m], v[2], v[3]);
                        if (!NARROW) mma(sums[m][2 * step], low[m], v[0], v[1]), mma(sums[m][2 * step + 1], low[m], v[2], v[3]);
                    }
                }
            }
        }
        __syncthreads();  // before the tile's place is filled again
    }

#pragma unroll
    for (uint32_t m = 0; m < SIXTEENS; m++)
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            total[m][i] += __shfl_xor_sync(~0u, total[m][i], 1);
            total[m][i] += __shfl_xor_sync(~0u, total[m][i], 2);
            const uint32_t token = row + m * 16 + i * 8;
            if (token >= n_tokens) continue;
            const float factor = 1 / total[m][i];
            const size_t at = size_t(first_token + token) * p.stride + head * head_dim;
#pragma unroll
            for (uint32_t n = 0; n < 2 * STEPS; n++) {
                const uint32_t c = n * 8 + column;
                if (c >= head_dim) break;
                const float a = sums[m][n][2 * i] * factor, b = sums[m][n][2 * i + 1] * factor;
                if (NARROW) *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(p.out) + at + c) = pack(a, b);
                else *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at + c) = {a, b};
            }
        }
}

#define ATTEND(DIM)                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) attend_##DIM(const __grid_constant__ Attend p) { attend<DIM, false>(p); } \
    extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) attend_narrow_##DIM(const __grid_constant__ Attend p) { attend<DIM, true>(p); }
ATTEND(32)
ATTEND(64)
ATTEND(128)
ATTEND(256)

struct AttendOne {
    Heads heads;
    float* out;      // [n_heads, head_dim]
    float* partial;  // [n_heads, gridDim.y, cached_dim + 2]: clusters' unfinished sums, their largest score and weight
    uint32_t* done;  // [gridDim.x], zeros
    uint32_t window;
};

constexpr uint32_t ONE_THREADS = 256, ONE_WARPS = ONE_THREADS / 32, ONE_TILE = 64, ONE_HEADS = 2, ONE_CLUSTER = 4;

// The same for one token, which place_heads has not seen: each block rotates its queries, and the one that comes to the
// token's own position its key. blockIdx: heads, share of the positions. A thread has eight columns of every few positions; those
// of the first tile are on their way before the activations are known. The blocks that share heads are one cluster or several: those of one join what
// they have through shared memory, and the last block what several clusters have.
template <uint32_t DIM>
__device__ __forceinline__ void attend_one(const AttendOne& p) {
    constexpr uint32_t OCTETS = DIM / 8, LOADS = ONE_TILE * OCTETS / ONE_THREADS;
    __shared__ float weights[ONE_HEADS][ONE_TILE];
    __shared__ float largest[ONE_HEADS], rescale[ONE_HEADS], total[ONE_HEADS];
    // What a block's columns are joined from: of each block of its cluster, those sums, and of each head the largest score and the weight.
    __shared__ float sums_of[ONE_CLUSTER][ONE_HEADS * DIM], largest_of[ONE_CLUSTER][ONE_HEADS], total_of[ONE_CLUSTER][ONE_HEADS];
    __shared__ __align__(16) __nv_bfloat16 own[2][DIM];  // the token's key and value
    __shared__ bool is_last;
    extern __shared__ float room[];  // [ONE_WARPS][ONE_HEADS][DIM]: queries, and at the end each warp's sums
    start_next();
    const Heads& heads = p.heads;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, head_dim = heads.head_dim;
    const uint32_t group = heads.n_heads / heads.n_kv_heads, tiles_of_group = (group + ONE_HEADS - 1) / ONE_HEADS;
    const uint32_t kv_head = blockIdx.x / tiles_of_group, first_of_tile = blockIdx.x % tiles_of_group * ONE_HEADS;
    const uint32_t head = kv_head * group + first_of_tile, n = min(ONE_HEADS, group - first_of_tile);
    // Of a step, nothing starts before what reads its tokens has seen it begin; and earlier positions are of earlier steps.
    const uint32_t position = *(volatile const uint32_t*)heads.first_position;
    const uint32_t first = p.window && position + 1 > p.window ? position + 1 - p.window : 0;
    const uint32_t n_tiles = (position + 1 - first + ONE_TILE - 1) / ONE_TILE, n_shares = min(n_tiles, gridDim.y);
    // A cluster's blocks take turns at its columns.
    const uint32_t size = cluster_size(), rank = blockIdx.y % size, cluster = blockIdx.y / size, n_clusters = (n_shares + size - 1) / size;
    const uint32_t n_blocks = min(size, n_shares - cluster * size);
    start_cluster();
    if (blockIdx.y >= n_shares) return;  // the others wait for the kernel before

    const size_t cached = size_t(kv_head) * heads.capacity * DIM;
    const uint32_t octet = threadIdx.x % OCTETS, row = threadIdx.x / OCTETS;
    constexpr uint32_t ROWS = ONE_THREADS / OCTETS;  // positions that one load of all threads takes
    uint4 k[LOADS], v[LOADS];
    auto load = [&](const __nv_bfloat16* from, uint32_t tile, uint4 (&to)[LOADS]) {
#pragma unroll
        for (uint32_t l = 0; l < LOADS; l++) {
            const uint32_t at = first + tile * ONE_TILE + l * ROWS + row;
            to[l] = at < position ? reinterpret_cast<const uint4*>(from + cached + size_t(at) * DIM)[octet] : uint4{};
        }
    };
    load(heads.keys, blockIdx.y, k);
    load(heads.values, blockIdx.y, v);
    const Angles<(DIM + 63) / 64> angles(heads, position);
    for (uint32_t i = threadIdx.x; i < ONE_HEADS * DIM; i += ONE_THREADS)
        if (i / DIM >= n || i % DIM >= head_dim) room[i] = 0;
    for (uint32_t i = threadIdx.x; i < 2 * DIM; i += ONE_THREADS)
        if (i % DIM >= head_dim) own[i / DIM][i % DIM] = 0;
    if (threadIdx.x < ONE_HEADS) largest[threadIdx.x] = -INFINITY, total[threadIdx.x] = 0;
    uint32_t share_of_own = (n_tiles - 1) % n_shares;
    asm volatile("" : "+r"(share_of_own));  // or it would be worked out behind the wait
    const bool has_own = share_of_own == blockIdx.y;
    const float root = rsqrtf(head_dim);
    wait_for_previous();

    for (uint32_t job = warp; job < n + (has_own ? 2 : 0); job += ONE_WARPS) {
        if (job < n) {
            rotate(heads, heads.q + size_t(head + job) * head_dim, true, angles,
                   [&](uint32_t i, float value) { room[job * DIM + i] = value * root; });
            continue;
        }
        const size_t at = cached + size_t(position) * DIM;
        auto keep = [&](uint32_t which, uint32_t i, float value) {
            own[which][i] = __float2bfloat16(value);
            if (first_of_tile == 0) (which ? heads.values : heads.keys)[at + i] = own[which][i];
        };
        if (job == n) {
            rotate(heads, heads.k + size_t(kv_head) * head_dim, false, angles, [&](uint32_t i, float value) { keep(0, i, value); });
        } else {
            // Asked for at once: what is kept might be what is read next, for all the compiler knows.
            float value[DIM / 32];
#pragma unroll
            for (uint32_t n = 0; n < DIM / 32; n++) value[n] = lane + 32 * n < head_dim ? heads.v[size_t(kv_head) * head_dim + lane + 32 * n] : 0;
#pragma unroll
            for (uint32_t n = 0; n < DIM / 32; n++)
                if (lane + 32 * n < head_dim) keep(1, lane + 32 * n, value[n]);
        }
    }
    __syncthreads();

    float sums[ONE_HEADS][8] = {};
    for (uint32_t tile = blockIdx.y; tile < n_tiles; tile += n_shares) {
        const uint32_t start = first + tile * ONE_TILE;
#pragma unroll
        for (uint32_t l = 0; l < LOADS; l++) {
            const uint32_t in_tile = l * ROWS + row, at = start + in_tile;
            if (at == position) {
                k[l] = reinterpret_cast<const uint4*>(own[0])[octet];
                v[l] = reinterpret_cast<const uint4*>(own[1])[octet];
            }
            const float2 k0 = widen(k[l].x), k1 = widen(k[l].y), k2 = widen(k[l].z), k3 = widen(k[l].w);
#pragma unroll
            for (uint32_t h = 0; h < ONE_HEADS; h++) {
                if (h >= n) break;
                const float4 a = reinterpret_cast<const float4*>(room + h * DIM)[2 * octet];
                const float4 b = reinterpret_cast<const float4*>(room + h * DIM)[2 * octet + 1];
                float score = k0.x * a.x + k0.y * a.y + k1.x * a.z + k1.y * a.w;
                score += k2.x * b.x + k2.y * b.y + k3.x * b.z + k3.y * b.w;
#pragma unroll
                for (uint32_t lanes = 1; lanes < OCTETS; lanes *= 2) score += __shfl_xor_sync(~0u, score, lanes);
                if (octet == 0) weights[h][in_tile] = at <= position ? score : -INFINITY;
            }
        }
        if (tile + n_shares < n_tiles) load(heads.keys, tile + n_shares, k);
        __syncthreads();
        if (warp < n) {
            const float s0 = weights[warp][lane], s1 = weights[warp][lane + 32], before = largest[warp];
            const float best = fmaxf(warp_max(fmaxf(s0, s1)), before);
            const float w0 = expf(s0 - best), w1 = expf(s1 - best), sum = warp_sum(w0 + w1);
            weights[warp][lane] = w0, weights[warp][lane + 32] = w1;
            __syncwarp();
            if (lane == 0) {
                rescale[warp] = expf(before - best);
                total[warp] = total[warp] * rescale[warp] + sum;
                largest[warp] = best;
            }
        }
        __syncthreads();
#pragma unroll
        for (uint32_t h = 0; h < ONE_HEADS; h++) {
            if (h >= n) break;
            const float factor = rescale[h];
#pragma unroll
            for (uint32_t j = 0; j < 8; j++) sums[h][j] *= factor;
        }
#pragma unroll
        for (uint32_t l = 0; l < LOADS; l++) {
            const float2 v0 = widen(v[l].x), v1 = widen(v[l].y), v2 = widen(v[l].z), v3 = widen(v[l].w);
            const float value[8] = {v0.x, v0.y, v1.x, v1.y, v2.x, v2.y, v3.x, v3.y};
#pragma unroll
            for (uint32_t h = 0; h < ONE_HEADS; h++) {
                if (h >= n) break;
                const float weight = weights[h][l * ROWS + row];
#pragma unroll
                for (uint32_t j = 0; j < 8; j++) sums[h][j] += weight * value[j];
            }
        }
        if (tile + n_shares < n_tiles) load(heads.values, tile + n_shares, v);
        __syncthreads();
    }

    // The threads' sums of one column: within the warp, then the warps'.
#pragma unroll
    for (uint32_t h = 0; h < ONE_HEADS; h++) {
        if (h >= n) break;
#pragma unroll
        for (uint32_t j = 0; j < 8; j++) {
#pragma unroll
            for (uint32_t lanes = OCTETS; lanes < 32; lanes *= 2) sums[h][j] += __shfl_xor_sync(~0u, sums[h][j], lanes);
            if (lane < OCTETS) room[(warp * ONE_HEADS + h) * DIM + octet * 8 + j] = sums[h][j];
        }
    }
    __syncthreads();
    wait_cluster();
    for (uint32_t i = threadIdx.x; i < n * DIM; i += ONE_THREADS) {
        float sum = 0;
#pragma unroll
        for (uint32_t w = 0; w < ONE_WARPS; w++) sum += room[w * ONE_HEADS * DIM + i];
        put_in_block(sums_of[rank][i], i % n_blocks, sum);
    }
    if (threadIdx.x < n_blocks * n) {
        const uint32_t h = threadIdx.x % n, block = threadIdx.x / n;
        put_in_block(largest_of[rank][h], block, largest[h]);
        put_in_block(total_of[rank][h], block, total[h]);
    }
    sync_cluster();
    // Sums that `n_parts` have, each of them those of the largest score that it has come to: of(part).
    struct Sums {
        float largest, weight, sum;
    };
    auto join = [](uint32_t n_parts, auto of) {
        Sums all{-INFINITY, 0, 0};
#pragma unroll 4
        for (uint32_t part = 0; part < n_parts; part++) all.largest = fmaxf(all.largest, of(part).largest);
#pragma unroll 4
        for (uint32_t part = 0; part < n_parts; part++) {
            const Sums one = of(part);
            const float factor = expf(one.largest - all.largest);
            all.sum += factor * one.sum, all.weight += factor * one.weight;
        }
        return all;
    };
    auto put = [&](uint32_t i, Sums all) {
        if (i % DIM < head_dim) p.out[size_t(head + i / DIM) * head_dim + i % DIM] = all.sum / all.weight;
    };
    for (uint32_t i = threadIdx.x * n_blocks + rank; i < n * DIM; i += ONE_THREADS * n_blocks) {
        const uint32_t h = i / DIM;
        const Sums all = join(n_blocks, [&](uint32_t b) { return Sums{largest_of[b][h], total_of[b][h], sums_of[b][i]}; });
        if (n_clusters == 1) {
            put(i, all);
            continue;
        }
        float* to = p.partial + (size_t(head + h) * gridDim.y + cluster) * (DIM + 2);
        to[i % DIM] = all.sum;
        if (i % DIM == 0) to[DIM] = all.largest, to[DIM + 1] = all.weight;
    }
    if (n_clusters == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&p.done[blockIdx.x], 1) == n_shares - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) p.done[blockIdx.x] = 0;
    for (uint32_t i = threadIdx.x; i < n * DIM; i += ONE_THREADS) {
        const float* from = p.partial + size_t(head + i / DIM) * gridDim.y * (DIM + 2);
        put(i, join(n_clusters, [&](uint32_t c) {
            const float* one = from + c * (DIM + 2);
            return Sums{__ldcg(one + DIM), __ldcg(one + DIM + 1), __ldcg(one + i % DIM)};
        }));
    }
}

extern "C" __global__ void __launch_bounds__(ONE_THREADS) attend_one_32(const __grid_constant__ AttendOne p) { attend_one<32>(p); }
extern "C" __global__ void __launch_bounds__(ONE_THREADS) attend_one_64(const __grid_constant__ AttendOne p) { attend_one<64>(p); }
extern "C" __global__ void __launch_bounds__(ONE_THREADS) attend_one_128(const __grid_constant__ AttendOne p) { attend_one<128>(p); }
extern "C" __global__ void __launch_bounds__(ONE_THREADS) attend_one_256(const __grid_constant__ AttendOne p) { attend_one<256>(p); }

// ---- The choice of a token -------------------------------------------------------------------------------------------

struct Choose {
    const float* logits;        // [vocab]
    unsigned long long* best;   // zero
    uint32_t* done;             // zero
    uint32_t* choice_host;      // token, its logit's bits; in the host's memory
    uint32_t vocab;
};

// The largest logit, the first of equal ones; a NaN counts as larger than any number.
extern "C" __global__ void choose(const __grid_constant__ Choose p) {
    __shared__ unsigned long long block_best;
    wait_for_previous();
    start_next();
    if (threadIdx.x == 0) block_best = 0;
    unsigned long long best = 0;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < p.vocab; i += gridDim.x * blockDim.x) {
        const uint32_t bits = __float_as_uint(p.logits[i]);
        const uint32_t order = isnan(p.logits[i]) ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
        best = max(best, (unsigned long long)(order) << 32 | ~i);
    }
    __syncthreads();
    atomicMax(&block_best, best);
    __syncthreads();
    if (threadIdx.x != 0) return;
    atomicMax(p.best, block_best);
    __threadfence();
    if (atomicAdd(p.done, 1) != gridDim.x - 1) return;
    __threadfence();
    const uint32_t token = ~uint32_t(atomicExch(p.best, 0));
    *p.done = 0;
    p.choice_host[0] = token;
    p.choice_host[1] = __float_as_uint(p.logits[token]);
}
