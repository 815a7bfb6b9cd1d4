// The instruction set, chosen at run time, and the dtypes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qtp {

enum class Isa : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};
constexpr int kIsas = 5;

Isa best_isa();          // what this processor has
Isa isa();               // what is used: the best one, unless `use_isa` said otherwise
void use_isa(Isa isa);   // for tests; must be one that the processor has

enum class DType : int { kF32, kBF16, kF16 };

constexpr int kDTypes = 3;
constexpr size_t kItemBytes[kDTypes] = {4, 2, 2};

}  // namespace qtp

// The table named `name` of the instruction set in use, from those that each_isa.inl has made.
#if defined(__x86_64__) && !defined(__clang__)
#define QTP_CHOOSE(name)                                        \
  (qtp::isa() == qtp::Isa::kAmx          ? amx::name            \
   : qtp::isa() == qtp::Isa::kAvx512Bf16 ? avx512bf16::name     \
   : qtp::isa() == qtp::Isa::kAvx512     ? avx512::name         \
   : qtp::isa() == qtp::Isa::kAvx2       ? avx2::name           \
                                         : baseline::name)
#else
#define QTP_CHOOSE(name) (baseline::name)
#endif
