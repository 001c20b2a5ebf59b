// Shapes of well-known models, so that a plan can be made without their files.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"

namespace uly::models {

struct Known {
  const char* names;       // repositories of this shape, separated by spaces
  const char* generation;  // what all models of one generation share: JSON text
  int64_t D, F, N, K, H, V, L;
  bool tied;
};
const std::vector<Known>& known();

// Returns the config.json of `repository` as far as its shape needs it; nothing if no row names it.
std::optional<Json> known_config(const std::string& repository);

}  // namespace uly::models
