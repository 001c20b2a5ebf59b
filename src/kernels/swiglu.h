// The gated unit of the MLP: a = silu(gate) up, with gate | up in one matrix of 2F columns.
#pragma once

#include "kernels/matrix.h"

namespace uly::kernels {

struct SwigluArgs {
  Matrix a, gate_up;  // activation txF | activation tx2F
};

// gate_up becomes its gradient and a, where it has data, is written again, as swiglu would. a may be da.
struct SwigluGradArgs {
  Matrix gate_up, a, da;  // activation tx2F | activation txF | activation txF
};

void swiglu(const SwigluArgs& a, Stream stream);
void swiglu_grad(const SwigluGradArgs& a, Stream stream);

namespace cpu {

void swiglu(const SwigluArgs& a, int64_t begin, int64_t end);           // rows
void swiglu_grad(const SwigluGradArgs& a, int64_t begin, int64_t end);  // rows

}  // namespace cpu
}  // namespace uly::kernels
