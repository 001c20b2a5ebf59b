// How ranks on GPUs exchange: by NCCL, from GPU to GPU, or by Gloo, through host memory.
#pragma once

#include <string>

#include "plan/plan.h"

namespace uly::plan {

struct Exchanges {
  bool nccl = false;
  std::string words;  // "NCCL 2.28.9, from GPU to GPU"; of Gloo with the reason
};

// What ULYSSES_COMM asks for, else NCCL where it can be. Throws UserError where it asks for NCCL and that cannot be.
Exchanges choose_exchanges(const Machine& machine, int64_t world);

// Bytes that NCCL takes of a GPU for a rank of such a mesh, about.
int64_t nccl_bytes(const step::Mesh& mesh);

}  // namespace uly::plan
