#include "ops/buffer.h"

namespace uly::ops {

const char* name_of(Kind kind) {
  constexpr const char* kNames[kNumKinds] = {"weights", "gradients", "optimizer", "inputs", "saved for backward", "working tiles", "communication"};
  return kNames[static_cast<int>(kind)];
}

const char* name_of(Tier tier) {
  constexpr const char* kNames[kNumTiers] = {"device", "host", "disk"};
  return kNames[static_cast<int>(tier)];
}

}  // namespace uly::ops
