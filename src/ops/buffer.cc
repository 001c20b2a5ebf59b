#include "ops/buffer.h"

namespace uly::ops {

const char* name_of(Kind kind) {
  constexpr const char* kNames[kNumKinds] = {"weights", "gradients", "optimizer", "inputs", "saved for backward", "working tiles", "communication"};
  return kNames[static_cast<int>(kind)];
}

}  // namespace uly::ops
