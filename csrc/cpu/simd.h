// One vector type of fp32, and of fp64, per instruction set, written with the GCC/Clang vector extensions so that the same kernel source
// compiles for AVX-512, AVX2, NEON and plain C++. setup.py compiles every kernel once per instruction set with CHASSIS_ISA
// naming the variant; everything here lives in that namespace so that the variants never mix.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace chassis {
namespace CHASSIS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef double vd __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));

constexpr float kInf = std::numeric_limits<float>::infinity();

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
inline vd load(const double* p) { vd v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, vd v) { std::memcpy(p, &v, sizeof v); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float to_float(fp16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(float(mantissa), -24);
  uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
#endif
}

// Rounds to nearest even; a NaN stays a NaN.
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out.bits = x != x ? uint16_t((bits >> 16) | 64) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float x, fp16& out) {
#if defined(__F16C__)
  out.bits = _cvtss_sh(x, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    out.bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {  // 65520 and above round to infinity
    out.bits = sign | 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14: adding 0.5 rounds to the spacing of the subnormals, 2^-24
    float shifted = std::fabs(x) + 0.5f;
    std::memcpy(&bits, &shifted, 4);
    out.bits = uint16_t(sign | (bits - 0x3f000000));
  } else {
    out.bits = uint16_t(sign | ((bits + 0xfff + ((bits >> 13) & 1) - (112u << 23)) >> 13));
  }
#endif
}

inline vf load(const bf16* p) {
  vh half;
  std::memcpy(&half, p, sizeof half);
  vi wide = __builtin_convertvector(half, vi) << 16;
  vf out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}
inline vf load(const fp16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));  // the unmasked form warns in GCC 12
#elif defined(__AVX2__) && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf out;
  for (int i = 0; i < kLanes; ++i) out[i] = to_float(p[i]);
  return out;
#endif
}
template <class T>
inline void store(T* p, vf v) {
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p[i]);
}

inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf add(vf a, vf b) { return a + b; }

// v with the lanes `step` further on in their places, around the end.
template <int step, size_t... i>
inline vf rotate(vf v, std::index_sequence<i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, ((i + step) % kLanes)...);
#else
  return __builtin_shuffle(v, vi{int32_t((i + step) % kLanes)...});
#endif
}
// f over all lanes, halves onto halves: fewer steps that wait for each other than lane by lane.
template <int step = kLanes / 2, class F>
inline float reduce(vf v, F f) {
  v = f(v, rotate<step>(v, std::make_index_sequence<kLanes>()));
  if constexpr (step > 1) return reduce<step / 2>(v, f);
  else return v[0];
}
inline float sum(vf v) { return reduce(v, add); }
inline float max(vf v) { return reduce(v, vmax); }

// exp(x) for x <= 0 to about 1 ulp: x = n ln2 + r, |r| <= ln2/2, degree-6 polynomial in r, scaled by 2^n through the
// exponent bits. Everything below -87.3 gives exactly 0, so that -inf needs no branch.
inline vf exp_nonpositive(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
#if defined(__AVX512F__)
  const vf clamped = x;
#else
  const vf clamped = vmax(splat(-87.3f), x);  // in this order a NaN stays a NaN
#endif
  vf n = (clamped * 1.44269504088896341f + magic) - magic;
  vf r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)n);
#else
  vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  vf scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  vf value = p * scale;
  return x < splat(-87.3f) ? vf{} : value;
#endif
}

// log(x) to about 1 ulp for normal x > 0: x = m 2^e with m in [sqrt(1/2), sqrt(2)), polynomial in m - 1.
inline vf log_positive(vf x) {
  vi bits;
  std::memcpy(&bits, &x, sizeof bits);
  vi e = (bits - 0x3f3504f3) >> 23;
  bits -= e << 23;
  vf m;
  std::memcpy(&m, &bits, sizeof m);
  m -= 1.0f;
  vf n = __builtin_convertvector(e, vf), z = m * m;
  vf y = splat(7.0376836292e-2f);
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z + n * -2.12194440e-4f - 0.5f * z;
  vf value = m + y + n * 0.693359375f;
  return x == x ? value : x;
}

// tanh to about 2 ulp: a polynomial near 0, (1 - e^-2|x|) / (1 + e^-2|x|) elsewhere.
inline vf tanh(vf x) {
  vf size = x < 0 ? -x : x, square = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  vf e = exp_nonpositive(size * -2.0f);
  vf far = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? x + x * square * p : x < 0 ? -far : far;
}

}  // namespace CHASSIS_ISA
}  // namespace chassis
