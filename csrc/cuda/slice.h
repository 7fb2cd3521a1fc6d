// The entries of a projection in chosen columns: what kernels ask of a Slice.
#pragma once
#include "cuda/launch.h"

namespace chassis {
namespace cuda {

// Whether J_j is the first of its equals: repeated columns share the entries of the first.
__device__ inline bool first_of_equals(const Slice& m, int64_t j) { return j == 0 || m.columns[j] != m.columns[j - 1]; }

}  // namespace cuda
}  // namespace chassis
