// JSON that keeps the order in which keys were written.
#pragma once

#include <nlohmann/json.hpp>

namespace uly {
using Json = nlohmann::ordered_json;
}
