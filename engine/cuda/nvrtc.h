// What the kernels use of <cuda_bf16.h>, <cstdint> and <type_traits>, for NVRTC, which comes without them. The engine hands it over
// under each of these names; nvcc never sees it. The conversions are the instructions that NVIDIA's header uses from compute capability 8.0 on.
#ifndef CODECLLM_NVRTC_H
#define CODECLLM_NVRTC_H

#define INFINITY __int_as_float(0x7f800000)

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

namespace std {
template <class T, T VALUE>
struct integral_constant {
    using value_type = T;
    using type = integral_constant;
    static constexpr T value = VALUE;
    __device__ __host__ constexpr operator T() const { return VALUE; }
    __device__ __host__ constexpr T operator()() const { return VALUE; }
};
template <bool VALUE>
using bool_constant = integral_constant<bool, VALUE>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool CHOICE, class A, class B>
struct conditional {
    using type = A;
};
template <class A, class B>
struct conditional<false, A, B> {
    using type = B;
};
template <bool CHOICE, class A, class B>
using conditional_t = typename conditional<CHOICE, A, B>::type;

template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
inline constexpr bool is_same_v = is_same<A, B>::value;
}  // namespace std

struct __align__(2) __nv_bfloat16 {
    uint16_t bits;
    __device__ __forceinline__ __nv_bfloat16& operator=(float v) {
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
        return *this;
    }
};
struct __align__(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

__device__ __forceinline__ float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ __forceinline__ uint16_t __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
__device__ __forceinline__ __nv_bfloat16 __ushort_as_bfloat16(uint16_t v) { return {v}; }
__device__ __forceinline__ __nv_bfloat16 __float2bfloat16_rn(float v) {
    __nv_bfloat16 narrow;
    return narrow = v;
}
__device__ __forceinline__ __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }
__device__ __forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return {{uint16_t(pair)}, {uint16_t(pair >> 16)}};
}

#endif
