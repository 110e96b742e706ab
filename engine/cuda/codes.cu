// Codes of `zstd` tensors, once they are decompressed, as the BF16 values that dense products take.
#include "common.cuh"

struct CodesToValues {
    const uint8_t* codes;  // [n_rows, n_cols], of code_bytes each
    const float* values;   // [256], by code of one byte; null: the codes are BF16 values
    const float* scales;   // [n_rows], likewise
    __nv_bfloat16* out;    // [n_rows, stride]; zeros past n_cols
    uint32_t n_cols, stride;
};

// Two values, rounded, the first one lower.
__device__ __forceinline__ uint32_t pair(float a, float b) {
    return __bfloat16_as_ushort(__float2bfloat16(a)) | uint32_t(__bfloat16_as_ushort(__float2bfloat16(b))) << 16;
}

// A block takes a row.
extern "C" __global__ void codes_to_values(const __grid_constant__ CodesToValues p) {
    __shared__ float values[256];
    if (p.values) {
        const float scale = p.scales[blockIdx.x];
        for (uint32_t i = threadIdx.x; i < 256; i += blockDim.x) values[i] = p.values[i] * scale;
    }
    wait_for_previous();
    __syncthreads();
    __nv_bfloat16* out = p.out + size_t(blockIdx.x) * p.stride;
    const size_t first = size_t(blockIdx.x) * p.n_cols;
    if (!p.values) {
        const __nv_bfloat16* row = reinterpret_cast<const __nv_bfloat16*>(p.codes) + first;
        for (uint32_t i = threadIdx.x; i < p.stride; i += blockDim.x)
            out[i] = i < p.n_cols ? row[i] : __float2bfloat16(0.0f);
        return;
    }
    // Four at once, where every row begins at a multiple of four bytes.
    const uint8_t* row = p.codes + first;
    const uint32_t quads = p.n_cols % 4 ? 0 : p.n_cols / 4;
    for (uint32_t i = threadIdx.x; i < quads; i += blockDim.x) {
        const uchar4 codes = reinterpret_cast<const uchar4*>(row)[i];
        reinterpret_cast<uint2*>(out)[i] = {pair(values[codes.x], values[codes.y]), pair(values[codes.z], values[codes.w])};
    }
    for (uint32_t i = 4 * quads + threadIdx.x; i < p.stride; i += blockDim.x)
        out[i] = __float2bfloat16(i < p.n_cols ? values[row[i]] : 0.0f);
}
