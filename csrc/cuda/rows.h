// What CUDA kernels over rows of logits share: conversions, 16-byte accesses to rows that start anywhere, block reductions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "cuda/launch.h"

namespace chassis {
namespace cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr float kLog2e = 1.44269504088896340736f;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(fp16 x) { return __half2float(x); }
__device__ inline void from_float(float x, float& y) { y = x; }
__device__ inline void from_float(float x, bf16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, fp16& y) { y = __float2half_rn(x); }

// One value of a matrix whose type is only known at run time.
__device__ inline float value(const Matrix& m, int64_t row, int64_t column) {
  const int64_t at = row * m.stride + column;
  if (m.dtype == DType::fp32) return static_cast<const float*>(m.data)[at];
  if (m.dtype == DType::bf16) return to_float(static_cast<const bf16*>(m.data)[at]);
  return to_float(static_cast<const fp16*>(m.data)[at]);
}

template <class T> constexpr int kPack = 16 / sizeof(T);

template <class T>
__device__ inline void unpack(const uint4& raw, float (&x)[kPack<T>]) {
  T given[kPack<T>];
  std::memcpy(given, &raw, sizeof raw);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) x[i] = to_float(given[i]);
}

// Elements before the first whole 16 bytes.
template <class T>
__device__ inline int lead(const T* row, int width) {
  const int n = int((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
  return n < width ? n : width;
}

// f(s, x) for all of a row, whose places fit an int: x are the kPack<T> values from s on, or the single value at s near an end
// that is not aligned. `kFlight` packs are under way at once. `Backwards` starts at the end, and marks what it read as not needed again.
template <bool Backwards, int kFlight, class T, class F>
__device__ inline void for_packs(const T* row, int width, F f) {
  const int first = lead(row, width), packs = (width - first) / kPack<T>, last = first + packs * kPack<T>;
  const uint4* data = reinterpret_cast<const uint4*>(row + first);
  for (int from = threadIdx.x; from < packs; from += kFlight * blockDim.x) {
    uint4 raw[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int at = from + i * blockDim.x;
      if (at < packs) raw[i] = Backwards ? __ldcs(data + packs - 1 - at) : __ldcg(data + at);
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int at = from + i * blockDim.x;
      float x[kPack<T>];
      if (at < packs) {
        unpack<T>(raw[i], x);
        f(first + (Backwards ? packs - 1 - at : at) * kPack<T>, x);
      }
    }
  }
  const int lane = threadIdx.x, single = lane < first ? lane : last + lane - first;
  if (single < width) {
    float x[1] = {to_float(row[single])};
    f(single, x);
  }
}

template <class T>
__device__ inline void store(T* out, const float (&x)[1], bool) { from_float(x[0], *out); }
template <class T>
__device__ inline void store(T* out, const float (&x)[kPack<T>], bool aligned) {
  T rounded[kPack<T>];
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) from_float(x[i], rounded[i]);
  if (aligned) {
    uint4 raw;
    std::memcpy(&raw, rounded, sizeof raw);
    __stcs(reinterpret_cast<uint4*>(out), raw);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) out[i] = rounded[i];
  }
}

// out[from .. to) = 0
template <class T>
__device__ inline void fill_zero(T* out, int from, int to) {
  const int first = from + lead(out + from, to - from), packs = (to - first) / kPack<T>, last = first + packs * kPack<T>;
  uint4* data = reinterpret_cast<uint4*>(out + first);
  for (int i = threadIdx.x; i < packs; i += blockDim.x) __stcs(data + i, make_uint4(0, 0, 0, 0));
  for (int i = from + threadIdx.x; i < first; i += blockDim.x) from_float(0.0f, out[i]);
  for (int i = last + threadIdx.x; i < to; i += blockDim.x) from_float(0.0f, out[i]);
}

struct Sum {
  template <class X> __device__ X operator()(X a, X b) const { return a + b; }
};
struct Max {
  template <class X> __device__ X operator()(X a, X b) const { return a > b ? a : b; }
};
struct Min {
  template <class X> __device__ X operator()(X a, X b) const { return a < b ? a : b; }
};

// f over the x of all threads, in an order that is always the same; every thread gets the result. `scratch` has room for a value of each warp.
template <class X, class F>
__device__ inline X reduce(X x, F f, void* scratch) {
  X* of_warp = static_cast<X*>(scratch);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int step = 16; step; step /= 2) x = f(x, __shfl_xor_sync(kAll, x, step));
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  x = of_warp[0];
  for (int i = 1; i < warps; ++i) x = f(x, of_warp[i]);
  __syncthreads();  // before `scratch` is written again
  return x;
}

}  // namespace cuda
}  // namespace chassis
