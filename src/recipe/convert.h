// From what stands in a file to the value of a key.
#pragma once

#include <optional>
#include <string>

#include "recipe/field.h"
#include "recipe/yaml.h"

namespace uly::recipe {

// Returns the value, or nothing if the node is not what the key takes. Not for kSection and kSections.
std::optional<Json> convert(const Field& field, const Node& node);

// Says what the key takes: "an integer >= 1", "one of 'token', 'sample'".
std::string expectation(const Field& field);

// Returns the row's default; the row must have one.
Json default_of(const Field& field);

// Returns the choice whose value this is; nullptr if there is none.
const Choice* choice_of(const Field& field, const Json& value);

// Returns the candidate most like `word`, if one is near enough to be a typing error; "" otherwise.
std::string nearest(const std::string& word, const std::vector<std::string>& candidates);

}  // namespace uly::recipe
