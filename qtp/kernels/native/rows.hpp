// What is done to each row by itself.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.hpp"
#include "parallel.hpp"

namespace qtp {

struct RowsTable {
  // out = x / sqrt(mean(x^2) + eps), rounded, times weight, plus bias unless it is null, rounded; rows of `width` elements, one after
  // the other.
  void (*norm)(const void* x, size_t width, const void* weight, const void* bias, float eps, void* out, Range rows);
  // out[i] = silu(x[i]) * x[width + i] for these columns; rows of x are 2 * width long, those of out lie out_stride apart.
  void (*gate)(const void* x, size_t width, void* out, size_t out_stride, Range rows, Range columns);
  // x[i] *= sigmoid(gate), gate being one element of the table's dtype and x of another.
  void (*scale)(const void* gate, DType dtype, void* x, size_t width);
  // The `choices` largest of the softmax of a row, largest first and the lower index first among equals, divided by their sum if
  // `normalize`; chosen[i] are the indices.
  void (*choose)(const void* logits, size_t experts, size_t choices, bool normalize, void* weights, int64_t* chosen);
  // sum[i] += weight * y[i], weight being one element.
  void (*add)(float* sum, const void* weight, const float* y, Range columns);
  // out[i] += sum[i], rounded once.
  void (*finish)(void* out, const float* sum, Range columns);
  // x[i] += y[i], of the table's dtype both.
  void (*join)(void* x, const void* y, Range columns);
  // x[i] += y[i], y[i] being rounded to the table's dtype first.
  void (*join_wide)(void* x, const float* y, Range columns);
};

const RowsTable& rows_table(DType dtype);

}  // namespace qtp
