// The inner loop of linear layers over many tokens for AVX2: 3 rows of bfloat16 with 4 tokens, 12 sums, by hand. It takes all 16
// registers, and GCC keeps two of the sums in memory instead: 74 of the 84 GFLOP/s that a core (Zen 3) has with this.

#define QTP_EACH_SUM(each)                                                                                             \
  each(0) each(1) each(2) each(3) each(4) each(5) each(6) each(7) each(8) each(9) each(10) each(11)
#define QTP_ZERO(n) "vxorps %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n\t"
#define QTP_READ(n) "vmovups 32*" #n "(%[sums]), %%ymm" #n "\n\t"
#define QTP_WRITE(n) "vmovups %%ymm" #n ", 32*" #n "(%[sums])\n\t"
// 8 elements of a token, from so many bytes into a step, with those of the three rows.
#define QTP_TOKEN(at, a, b, c)                                                                                         \
  "vmovups " #at "(%[x], %[i], 8), %%ymm15\n\t"                                                                        \
  "vfmadd231ps %%ymm12, %%ymm15, %%ymm" #a "\n\tvfmadd231ps %%ymm13, %%ymm15, %%ymm" #b "\n\t"                         \
  "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #c "\n\t"

// sums[t * 3 + r], 8 lanes each, += the products of steps * 16 elements of row r with those of token t, which lie by turns:
// [step][token][8 even elements, 8 odd ones]. first: from 0. Memory is asked for 32 bytes a step, from `ahead` on.
QTP_INLINE void three_rows_four_tokens(const uint16_t* const* rows, const float* x, size_t steps, bool first, float* sums,
                                                      const void* ahead) {
  static const U odd = U{} + 0xFFFF0000u;
  size_t i = 0;
  asm volatile("test %[first], %[first]\n\t"
               "jz 1f\n\t" QTP_EACH_SUM(QTP_ZERO) "jmp 2f\n"
               "1:\n\t" QTP_EACH_SUM(QTP_READ) ".p2align 5\n"
               "2:\n\t"
               "vmovdqu (%[row0], %[i]), %%ymm12\n\tvmovdqu (%[row1], %[i]), %%ymm13\n\tvmovdqu (%[row2], %[i]), %%ymm14\n\t"
               "vpslld $16, %%ymm12, %%ymm12\n\tvpslld $16, %%ymm13, %%ymm13\n\tvpslld $16, %%ymm14, %%ymm14\n\t"
               QTP_TOKEN(0, 0, 1, 2) QTP_TOKEN(64, 3, 4, 5) QTP_TOKEN(128, 6, 7, 8) QTP_TOKEN(192, 9, 10, 11)
               "prefetcht0 (%[ahead], %[i])\n\t"
               "vmovdqu %[odd], %%ymm15\n\t"
               "vpand (%[row0], %[i]), %%ymm15, %%ymm12\n\tvpand (%[row1], %[i]), %%ymm15, %%ymm13\n\t"
               "vpand (%[row2], %[i]), %%ymm15, %%ymm14\n\t"
               QTP_TOKEN(32, 0, 1, 2) QTP_TOKEN(96, 3, 4, 5) QTP_TOKEN(160, 6, 7, 8) QTP_TOKEN(224, 9, 10, 11)
               "add $32, %[i]\n\tcmp %[end], %[i]\n\tjb 2b\n\t" QTP_EACH_SUM(QTP_WRITE)
               : [i] "+r"(i)
               : [first] "r"(int(first)), [row0] "r"(rows[0]), [row1] "r"(rows[1]), [row2] "r"(rows[2]), [x] "r"(x), [end] "r"(32 * steps),
                 [sums] "r"(sums), [ahead] "r"(ahead), [odd] "m"(odd)
               : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                 "xmm12", "xmm13", "xmm14", "xmm15");
}

#undef QTP_EACH_SUM
#undef QTP_ZERO
#undef QTP_READ
#undef QTP_WRITE
#undef QTP_TOKEN
