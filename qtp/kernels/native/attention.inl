// Compiled once for each instruction set: see each_isa.inl and attention.hpp.
namespace qtp {
namespace QTP_ISA {
namespace {

#include "vectors.inl"
#include "attention_common.inl"
#if QTP_AVX512
#include "attention_floats.inl"
#else
#include "attention_narrow.inl"
#endif
#if QTP_BF16
#include "attention_pairs.inl"
#endif
#if QTP_AMX
#include "attention_amx.inl"
#endif

#if QTP_AMX
using BF16Kernel = Tiles;
#elif QTP_BF16
using BF16Kernel = Pairs;
#else
using BF16Kernel = Floats<BF16>;
#endif

}  // namespace

extern const AttentionTable kAttention[kDTypes] = {table<Floats<F32>>(), table<BF16Kernel>(), table<Floats<F16>>()};

}  // namespace QTP_ISA
}  // namespace qtp
