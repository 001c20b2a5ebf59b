// Lines of text between processes.
#pragma once

#include <string>
#include <utility>

namespace uly::launch {

// Writes all of it, or as much as the other end takes.
void write_all(int fd, const std::string& text);

// Calls f(line), without its end, for each whole line of `text`; returns what is left.
template <typename F>
std::string for_lines(const std::string& text, F&& f) {
  size_t first = 0;
  for (size_t end; (end = text.find('\n', first)) != std::string::npos; first = end + 1) f(text.substr(first, end - first));
  return text.substr(first);
}

// The read end of a pipe that does not block.
struct LineReader {
  int fd = -1;             // closed, and -1, at the end of what comes
  std::string unfinished;  // a line without its end

  // Calls f(line) for all that has come, also for a last line without its end.
  template <typename F>
  void read(F&& f) {
    if (fd < 0) return;
    const bool ended = take();
    unfinished = for_lines(std::exchange(unfinished, ""), f);
    if (ended) close();
  }
  void close();

 private:
  bool take();  // true at the end
};

}  // namespace uly::launch
