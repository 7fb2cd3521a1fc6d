// IEEE half precision as CUDA's header names it, for the host.
#pragma once

struct __half { _Float16 value; };

inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
