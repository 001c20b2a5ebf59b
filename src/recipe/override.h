// Keys given on the command line.
#pragma once

#include <string>

#include "recipe/yaml.h"

namespace uly::recipe {

// Returns `root` with `assignment` ("data.max_length=1k", "checkpoint.0.output_dir=out") made; `root` stays as it is.
// Mappings on the way are made if missing; an index may be one past the end. Throws UserError "command line: ...".
NodePtr with_override(const NodePtr& root, const std::string& assignment);

}  // namespace uly::recipe
