// Keys whose values are not to be shown.
#pragma once

#include <string>

namespace uly::recipe {

// Whether what stands at a key of this name gives access to something. The tokens of a tokenizer do not: pad_token, max_tokens.
bool names_a_secret(const std::string& key);

}  // namespace uly::recipe
