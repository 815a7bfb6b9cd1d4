// y = x W^T with W in int8, straight from row-major or compressed weights: x as int8 too, whose sums are exact, or x in floats.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"
#include "parallel.hpp"
#include "sparse.hpp"

namespace qtp {

// What x becomes: clamp(round(x / input_scale + input_offset)); round(x / s), s being max |x| / 127 of the token, or 1 where x
// is 0; or floats as they are. Rounded half to even.
enum class Input : int { kStatic, kPerToken, kFloat };

// Outputs as they are wanted: in the dtype of x; as floats; the integers before they are scaled; or silu(gate) * up in the dtype of
// x, of which the first half of the rows is the gate.
enum class Form : int { kDType, kFloat, kInteger, kGated };

// A linear layer. x, bias, norm and norm_bias are of `dtype`; strides are in elements; what may be null says so.
//
// Integers: y = (sum of x_q W_q + quant_bias) * scale (* s) + bias. quant_bias, bias: `rows`, or null. scale: `rows`.
// Floats: y = sum over groups g of scale[row][g] * (sum of x W_q - offset[row][g] * sum of x) + bias. scale, offset: rows of groups,
// scale_stride apart; offset may be null. Column d is of group (phase + d) / group; group 0: all of one.
// norm (eps): an RMSNorm that x goes through first, or null; norm_bias may be null.
// sums: of each row of W; needed where `has_vnni`, may be null elsewhere.
// sparse: W where weight is null; no sums are needed then, and x is Input::kStatic.
struct Int8Linear {
  DType dtype;
  Input input;
  size_t rows, k;
  const int8_t* weight;
  size_t stride;
  float input_scale, input_offset;
  const int32_t* quant_bias;
  const float *scale, *offset;
  size_t scale_stride, group, phase;
  const void* bias;
  const void *norm, *norm_bias;
  float eps;
  const int32_t* sums;
  Sparse sparse;

  bool compressed() const { return weight == nullptr && sparse.index != nullptr; }
};

// x: tokens rows of k elements; maxima: max |x| of each token for Input::kPerToken, or null, which is that of these k. An output
// depends on its token alone, not on how many there are.
void run_int8(const Int8Linear& linear, const void* x, size_t tokens, size_t x_stride, const float* maxima, void* out, size_t out_stride,
              Form form);

// out = total * scale, in dtype; rows of `width`, one after the other, those of scale scale_stride apart.
void scale_sums(DType dtype, const int32_t* total, size_t rows, size_t width, const float* scale, size_t scale_stride, void* out);

// Whether this processor multiplies unsigned bytes with signed ones (AVX512-VNNI or AVX-VNNI).
bool has_vnni();

// to[r] = the sum of row r of W.
void sum_rows(const Int8Linear& linear, int32_t* to);

// What each instruction set has. memory: `bytes` for so many tokens and threads, in which `lay` puts the tokens of
// `range`; `run` then runs the outputs of `range` for all of them.
struct Int8Table {
  size_t (*bytes)(const Int8Linear& linear, size_t tokens, int threads);
  void (*lay)(const Int8Linear& linear, const void* x, size_t tokens, size_t x_stride, const float* maxima, void* memory, Range range);
  void (*run)(const Int8Linear& linear, size_t tokens, void* memory, int thread, void* out, size_t out_stride, Form form,
              Range range);
  void (*scale)(DType dtype, const int32_t* total, const float* scale, size_t width, void* out);
};

}  // namespace qtp
