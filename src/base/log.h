// Lines on stderr. A line says who speaks where there are several ranks.
#pragma once

#include <fmt/format.h>

#include <cstdio>
#include <string>

namespace uly {

template <typename... Args>
void say(fmt::format_string<Args...> format, Args&&... args) {
  const std::string line = fmt::format(format, std::forward<Args>(args)...) + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
}

}  // namespace uly
