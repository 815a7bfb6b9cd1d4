// Gated feed-forwards of which each token takes a few.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.hpp"

namespace qtp {

// gate_up: gated, to width outputs; down: wide, back to as many as gate_up takes.
struct Expert {
  Linear gate_up, down;
};

// Adds, for each token t, the sum over its k choices of weights[t, k] * down(gate_up(x[t])) to partial[t], in the order of the
// experts' indices. experts[i] may be null: nothing is added for it. x, partial: tokens rows of the width of the model, rows of
// x x_stride apart; weights: tokens x choices of their dtype. wide: partial is float32. False: out of memory.
bool run_experts(const Expert* const* experts, size_t count, const void* x, size_t tokens, size_t x_stride, const void* weights,
                 const int64_t* chosen, size_t choices, void* partial, bool wide);

}  // namespace qtp
