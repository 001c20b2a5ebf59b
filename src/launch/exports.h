// What of this process's environment ranks on other machines get.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace uly::launch {

using Variables = std::vector<std::pair<std::string, std::string>>;

// Variables that are known to matter (NCCL_, HF_, PYTHON, OMP_, ...), then the lines `KEY=VALUE` of ~/.deepspeed_env and of
// ./.deepspeed_env, or of the files of that name in DS_ENV_FILE; the later wins. Blank lines and `#` lines count for nothing. Throws
// UserError naming file and line for any other, and the variable whose value is not UTF-8, in which it travels.
Variables exported_variables();

bool is_utf8(std::string_view text);

}  // namespace uly::launch
