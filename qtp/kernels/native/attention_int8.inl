// Compiled once for each instruction set: see each_isa.inl and attention.hpp. Attention over an int8 cache: in float32 where the
// run is, else in integers. Instructions for bfloat16 have no part in it: with them it is that of AVX512.
#if !QTP_BF16
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
#include "attention_integers.inl"

}  // namespace

extern const AttentionTable kAttentionOverInt8[kDTypes] = {table<Floats<F32, I8>>(), table<Integers<BF16>>(), table<Integers<F16>>()};

}  // namespace QTP_ISA
}  // namespace qtp
#endif
