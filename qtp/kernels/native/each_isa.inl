// Includes QTP_BODY once for each instruction set, in a namespace of its name. No standard header may be included by the body,
// or its templates would be compiled for one instruction set and linked into the others.
//
// QTP_AVX512, QTP_AVX2: 1 inside the bodies for processors that have them; QTP_BF16, QTP_AMX: with AVX512-BF16, with AMX-BF16.
#define QTP_ISA baseline
#define QTP_AVX512 0
#define QTP_AVX2 0
#define QTP_BF16 0
#define QTP_AMX 0
#include QTP_BODY
#undef QTP_ISA
#undef QTP_AVX512
#undef QTP_AVX2

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define QTP_ISA avx2
#define QTP_AVX512 0
#define QTP_AVX2 1
#include QTP_BODY
#undef QTP_ISA
#undef QTP_AVX512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define QTP_ISA avx512
#define QTP_AVX512 1
#include QTP_BODY
#undef QTP_ISA
#undef QTP_BF16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define QTP_ISA avx512bf16
#define QTP_BF16 1
#include QTP_BODY
#undef QTP_ISA
#undef QTP_AMX
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define QTP_ISA amx
#define QTP_AMX 1
#include QTP_BODY
#undef QTP_ISA
#undef QTP_AVX512
#undef QTP_AVX2
#pragma GCC pop_options
#endif
#undef QTP_BF16
#undef QTP_AMX
#undef QTP_BODY
