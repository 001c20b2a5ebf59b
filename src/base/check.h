// Errors, sorted by who must act, and the checks that raise them.
//
// Thrown anywhere, caught in cli only, where each type has its exit code. A message is one sentence: where, what was
// expected, what was found, what to do.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace uly {

// What a process ends with; docs/operations.md explains each to users.
enum class Exit : int {
  kDone = 0,
  kUser = 2,         // the user must change something: recipe, files, room on disk
  kWillNotFit = 3,   // said by the planner before anything is loaded
  kInternal = 70,    // our bug
  kDevice = 75,      // a device, network or peer failed: try again
  kNumerics = 76,    // NaN or infinity; the step was not applied
  kPreempted = 85,   // saved; start again to go on
};

class Error : public std::runtime_error {
 public:
  Error(Exit exit, std::string message) : std::runtime_error(std::move(message)), exit_(exit) {}
  Exit exit() const { return exit_; }

 private:
  Exit exit_;
};

template <Exit E>
class ErrorOf : public Error {
 public:
  explicit ErrorOf(std::string message) : Error(E, std::move(message)) {}
};

using UserError = ErrorOf<Exit::kUser>;
using WillNotFit = ErrorOf<Exit::kWillNotFit>;
using InternalError = ErrorOf<Exit::kInternal>;
using DeviceError = ErrorOf<Exit::kDevice>;
using NumericsError = ErrorOf<Exit::kNumerics>;

template <typename... Args>
[[noreturn]] void user_error(fmt::format_string<Args...> format, Args&&... args) {
  throw UserError(fmt::format(format, std::forward<Args>(args)...));
}

template <typename A, typename B>
[[noreturn]] void check_failed(const char* file, int line, const A& a, const B& b, const char* what) {
  throw InternalError(fmt::format("{}:{}: {} vs {}: {}", file, line, a, b, what));
}

}  // namespace uly

#define ULY_USER_CHECK(condition, ...)          \
  do {                                          \
    if (!(condition)) ::uly::user_error(__VA_ARGS__); \
  } while (0)

#define ULY_CHECK(condition, what)                                                                  \
  do {                                                                                              \
    if (!(condition))                                                                               \
      throw ::uly::InternalError(fmt::format("{}:{}: {}: {}", __FILE__, __LINE__, #condition, what)); \
  } while (0)

#define ULY_CHECK_EQ(a, b, what)                                                   \
  do {                                                                             \
    const auto& uly_a = (a);                                                       \
    const auto& uly_b = (b);                                                       \
    if (!(uly_a == uly_b)) ::uly::check_failed(__FILE__, __LINE__, uly_a, uly_b, what); \
  } while (0)
