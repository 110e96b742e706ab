// Draws a token from the logits: `Draw::choose` in engine/src/sampler.rs, to the bit. Its steps are launches, one after
// another; in each, a block takes a slice of the logits, and the last block to be through decides for all.
//
// A token's key orders tokens, likelier ones higher: its logit's bits, so turned that they sort as numbers, then its number,
// inverted. No two keys are equal. What top-k and top-p keep are the tokens of a key, the cut, and above; it is found eleven
// bits at a time. Weights are whole numbers, so that their sums do not depend on the order of additions.
#include "common.cuh"

constexpr int THREADS = 512, PER_THREAD = 4, SLICE = THREADS * PER_THREAD;
constexpr int BINS = 2048;
// Most slices: what the last block adds up. So a token has at most 22 bits.
constexpr int MAX_SLICES = 2048;

struct State {
    // The largest key; zero between draws.
    unsigned long long best;
    // Tokens of this key and above are kept.
    unsigned long long cut;
    // The cut's bits that are known, and what is still to be reached among the keys that begin so: tokens or weight.
    unsigned long long prefix, need;
    // The largest logit.
    float max;
    // Whether the cut is known.
    uint32_t decided;
    // Blocks that are through; zero between launches.
    uint32_t done;
};

struct Sample {
    float* logits;              // [vocab], at a multiple of 16 bytes
    const uint32_t* seen;       // [n_seen], each once
    State* state;
    uint32_t* counts;           // [BINS], zeros between launches
    unsigned long long* weights;  // the same
    unsigned long long* sums;   // [MAX_SLICES]
    uint32_t* choice_host;      // the token, and the bits of the largest logit
    double scale, top_p;
    unsigned long long min_weight, random;
    uint32_t vocab, n_seen, top_k;
    float penalty;
    // Of `narrow`: which bits of the key, and whether the cut is one of weight.
    uint32_t level, by_weight;
};

__device__ __forceinline__ unsigned long long key_of(float logit, uint32_t token) {
    const uint32_t bits = __float_as_uint(logit);
    const uint32_t order = isnan(logit) ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
    return (unsigned long long)(order) << 32 | uint32_t(~token);
}

// floor(2^40 · 2^((logit − max) · scale)); every operation is rounded by itself, as on the host.
__device__ __forceinline__ unsigned long long weight_of(float logit, float max, double scale) {
    const double power = __dmul_rn(__dsub_rn(double(logit), double(max)), scale);
    if (power < -41.0) return 0;
    const double whole = rint(power);
    const double rest = __dsub_rn(power, whole);
    // ln(2)^k / k!
    constexpr double EXP2[11] = {1.0,
                                 0.6931471805599453,
                                 0.24022650695910072,
                                 0.05550410866482158,
                                 0.009618129107628477,
                                 0.0013333558146428443,
                                 0.0001540353039338161,
                                 1.5252733804059841e-05,
                                 1.321548679014431e-06,
                                 1.01780860092397e-07,
                                 7.054911620801123e-09};
    double sum = 0.0;
#pragma unroll
    for (int k = 10; k >= 0; k--) sum = __dadd_rn(__dmul_rn(sum, rest), EXP2[k]);
    const double exponent = __longlong_as_double((1023 + 40 + (long long)(whole)) << 52);
    return (unsigned long long)(__dmul_rn(sum, exponent));
}

// This thread's logits, as many as there are; its first token.
__device__ __forceinline__ uint32_t load(const Sample& p, uint32_t slice, float (&logits)[PER_THREAD], int& n) {
    const uint32_t first = slice * SLICE + threadIdx.x * PER_THREAD;
    n = first < p.vocab ? int(min(p.vocab - first, uint32_t(PER_THREAD))) : 0;
    if (n == PER_THREAD) {
        const float4 four = *reinterpret_cast<const float4*>(p.logits + first);
        logits[0] = four.x, logits[1] = four.y, logits[2] = four.z, logits[3] = four.w;
    } else {
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) logits[i] = i < n ? p.logits[first + i] : 0.0f;
    }
    return first;
}

// What the threads before this one have together, and what all have. All threads call it.
__device__ unsigned long long sum_before(unsigned long long x, unsigned long long& all) {
    __shared__ unsigned long long sums[THREADS];
    __syncthreads();
    sums[threadIdx.x] = x;
    for (int step = 1; step < THREADS; step *= 2) {
        __syncthreads();
        const unsigned long long before = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
        __syncthreads();
        sums[threadIdx.x] += before;
    }
    __syncthreads();
    all = sums[THREADS - 1];
    return sums[threadIdx.x] - x;
}

// Whether this block is the last one to be through; what the others wrote is then seen. All threads call it.
__device__ bool is_last_block(State* state) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&state->done, 1) == gridDim.x - 1;
    __syncthreads();
    __threadfence();
    if (is_last && threadIdx.x == 0) state->done = 0;
    return is_last;
}

// Makes logits of tokens seen less likely.
extern "C" __global__ void penalize(const __grid_constant__ Sample p) {
    wait_for_previous();
    start_next();
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.n_seen || p.seen[i] >= p.vocab) return;
    const float logit = p.logits[p.seen[i]];
    p.logits[p.seen[i]] = logit > 0.0f ? __fdiv_rn(logit, p.penalty) : __fmul_rn(logit, p.penalty);
}

// The largest logit, the first of equal ones, becomes the choice; a NaN counts as larger than any number. Begins a draw.
extern "C" __global__ void largest(const __grid_constant__ Sample p) {
    __shared__ unsigned long long block_best;
    wait_for_previous();
    start_next();
    if (threadIdx.x == 0) block_best = 0;
    __syncthreads();
    float logits[PER_THREAD];
    int n;
    const uint32_t first = load(p, blockIdx.x, logits, n);
    unsigned long long best = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const unsigned long long key = i < n ? key_of(logits[i], first + i) : 0;
        best = key > best ? key : best;
    }
    if (best) atomicMax(&block_best, best);
    __syncthreads();
    if (threadIdx.x == 0) atomicMax(&p.state->best, block_best);
    if (!is_last_block(p.state) || threadIdx.x != 0) return;
    const uint32_t token = ~uint32_t(atomicExch(&p.state->best, 0ull));
    p.state->max = p.logits[token];
    p.state->cut = 0;
    p.choice_host[0] = token;
    p.choice_host[1] = __float_as_uint(p.logits[token]);
}

// Bits of the key, from the top: the logit's in three parts, then the token's lower 22 in two.
__device__ __forceinline__ int shift_of(uint32_t level) {
    return level == 0 ? 53 : level == 1 ? 42 : level == 2 ? 32 : level == 3 ? 11 : 0;
}

__device__ __forceinline__ int width_of(uint32_t level) { return level == 2 ? 10 : 11; }

// Finds some bits of the cut: that of the first top_k tokens, or of those that have top_p of the weight of all that were kept
// so far.
extern "C" __global__ void narrow(const __grid_constant__ Sample p) {
    __shared__ uint32_t counts[BINS];
    // The lower 20 bits of weights and the others, which a slice cannot make overflow.
    __shared__ uint32_t low[BINS], high[BINS];
    wait_for_previous();
    start_next();
    State* const state = p.state;
    const float max = state->max;
    if (isinf(max) || isnan(max) || (p.level > 0 && state->decided)) return;
    for (int i = threadIdx.x; i < BINS; i += THREADS) counts[i] = low[i] = high[i] = 0;
    __syncthreads();

    const int shift = shift_of(p.level);
    const uint32_t mask = (1u << width_of(p.level)) - 1;
    const unsigned long long cut = state->cut, prefix = p.level ? state->prefix : 0;
    // The bits that were found before: all above these, and in the middle those that all tokens have.
    const int above = p.level == 3 ? 32 : shift + width_of(p.level);
    float logits[PER_THREAD];
    int n;
    const uint32_t first = load(p, blockIdx.x, logits, n);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const unsigned long long key = key_of(logits[i], first + i);
        if (i >= n || key < cut || (p.level > 0 && key >> above != prefix >> above)) continue;
        const uint32_t bin = uint32_t(key >> shift) & mask;
        atomicAdd(&counts[bin], 1u);
        if (p.by_weight) {
            const unsigned long long weight = weight_of(logits[i], max, p.scale);
            atomicAdd(&low[bin], uint32_t(weight) & 0xfffffu);
            atomicAdd(&high[bin], uint32_t(weight >> 20));
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        if (counts[i] == 0) continue;
        atomicAdd(&p.counts[i], counts[i]);
        const unsigned long long weight = ((unsigned long long)(high[i]) << 20) + low[i];
        if (weight) atomicAdd(&p.weights[i], weight);
    }
    if (!is_last_block(state)) return;

    // From the highest bin down.
    constexpr int BINS_PER_THREAD = BINS / THREADS;
    uint32_t count[BINS_PER_THREAD];
    unsigned long long amount[BINS_PER_THREAD], own = 0, all;
#pragma unroll
    for (int i = 0; i < BINS_PER_THREAD; i++) {
        const int bin = BINS - 1 - int(threadIdx.x) * BINS_PER_THREAD - i;
        count[i] = __ldcg(&p.counts[bin]);
        amount[i] = p.by_weight ? __ldcg(&p.weights[bin]) : count[i];
        own += amount[i];
        p.counts[bin] = 0;
        p.weights[bin] = 0;
    }
    unsigned long long before = sum_before(own, all);
    unsigned long long need = state->need;
    if (p.level == 0) {
        need = p.top_k;
        if (p.by_weight) {
            need = (unsigned long long)(__dmul_rn(p.top_p, __ull2double_rn(all)));
            need = need ? need : 1;
        }
    }
    // All have read what one writes.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < BINS_PER_THREAD; i++) {
        if (before < need && need <= before + amount[i]) {
            const unsigned long long bin = BINS - 1 - threadIdx.x * BINS_PER_THREAD - i;
            unsigned long long found = prefix | bin << shift;
            const bool is_decided = count[i] == 1 || (!p.by_weight && need == before + amount[i]);
            if (is_decided) state->cut = found > cut ? found : cut;
            // Bits 22 to 31 are those of every token.
            if (p.level == 2) found |= 0xffc00000ull;
            state->prefix = found;
            state->need = need - before;
            state->decided = is_decided;
        }
        before += amount[i];
    }
}

// Chooses the token that lies at the random number's share of the weights that are kept.
extern "C" __global__ void draw(const __grid_constant__ Sample p) {
    __shared__ unsigned long long rest;
    __shared__ uint32_t slice;
    wait_for_previous();
    start_next();
    const float max = p.state->max;
    // The likeliest is the choice already.
    if (isinf(max) || isnan(max)) return;
    const unsigned long long cut = p.state->cut;
    unsigned long long weights[PER_THREAD], all;
    // Weights of this thread's tokens of a slice, and their sum.
    auto weigh = [&](uint32_t slice, uint32_t& first, int& n) {
        float logits[PER_THREAD];
        first = load(p, slice, logits, n);
        unsigned long long sum = 0;
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            weights[i] = weight_of(logits[i], max, p.scale);
            if (i >= n || key_of(logits[i], first + i) < cut || weights[i] < p.min_weight) weights[i] = 0;
            sum += weights[i];
        }
        return sum;
    };
    uint32_t first;
    int n;
    sum_before(weigh(blockIdx.x, first, n), all);
    if (threadIdx.x == 0) p.sums[blockIdx.x] = all;
    if (!is_last_block(p.state)) return;

    constexpr int SLICES_PER_THREAD = MAX_SLICES / THREADS;
    unsigned long long sums[SLICES_PER_THREAD], own = 0;
#pragma unroll
    for (int i = 0; i < SLICES_PER_THREAD; i++) {
        const uint32_t slice = threadIdx.x * SLICES_PER_THREAD + i;
        sums[i] = slice < gridDim.x ? __ldcg(&p.sums[slice]) : 0;
        own += sums[i];
    }
    unsigned long long before = sum_before(own, all);
    const unsigned long long drawn = __umul64hi(p.random, all);
#pragma unroll
    for (int i = 0; i < SLICES_PER_THREAD; i++) {
        if (before <= drawn && drawn < before + sums[i]) {
            slice = threadIdx.x * SLICES_PER_THREAD + i;
            rest = drawn - before;
        }
        before += sums[i];
    }
    __syncthreads();
    before = sum_before(weigh(slice, first, n), all);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        if (before <= rest && rest < before + weights[i]) p.choice_host[0] = first + i;
        before += weights[i];
    }
}
