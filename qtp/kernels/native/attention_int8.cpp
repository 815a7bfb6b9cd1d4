#include "attention.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define QTP_BODY "attention_int8.inl"
#include "each_isa.inl"

namespace qtp {

const AttentionTable& attention_over_int8(DType dtype) {
#if defined(__x86_64__) && !defined(__clang__)
  if (isa() >= Isa::kAvx512) return avx512::kAttentionOverInt8[int(dtype)];
  if (isa() == Isa::kAvx2) return avx2::kAttentionOverInt8[int(dtype)];
#endif
  return baseline::kAttentionOverInt8[int(dtype)];
}

}  // namespace qtp
