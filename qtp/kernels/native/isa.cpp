#include "isa.hpp"

#include <atomic>

#if defined(__x86_64__) && !defined(__clang__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qtp {
namespace {

#if defined(__x86_64__) && !defined(__clang__)
// Whether there are matrix tiles with bfloat16, and the system lets this process use them.
bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
}
#endif

Isa found() {
#if defined(__x86_64__) && !defined(__clang__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c") ||
      !__builtin_cpu_supports("bmi2"))
    return Isa::kBaseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq"))
    return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
#else
  return Isa::kBaseline;
#endif
}

std::atomic<int> used{-1};

}  // namespace

Isa best_isa() {
  static const Isa best = found();
  return best;
}

Isa isa() {
  const int chosen = used.load(std::memory_order_relaxed);
  return chosen < 0 ? best_isa() : Isa(chosen);
}

void use_isa(Isa isa) { used.store(int(isa), std::memory_order_relaxed); }

}  // namespace qtp
