#include "train/metrics.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/json.h"
#include "base/log.h"
#include "base/units.h"
#include "checkpoint/hub_files.h"
#include "checkpoint/run_lock.h"

namespace uly::train {
namespace {

std::string human(double n) {  // 1.92K, base 1000
  constexpr const char* kUnits[] = {"", "K", "M", "B"};
  int unit = 0;
  for (; n >= 1000 && unit < 3; ++unit) n /= 1000;
  return unit == 0 ? fmt::format("{:.0f}", n) : fmt::format("{:.2f}{}", n, kUnits[unit]);
}

std::string beginning(const std::string& folder) { return (std::filesystem::path(folder) / "began.json").string(); }

}  // namespace

Metrics::Metrics(const recipe::Recipe& r, const models::Spec& spec, int64_t total_steps, int64_t ranks, bool on)
    : spec_(spec), total_steps_(total_steps), ranks_(ranks), first_(on), on_(on && r.train_log_iter_interval > 0), path_(r.train_log_metrics_path), begin_(std::chrono::steady_clock::now()) {
  if (!on_) return;
  const std::filesystem::path parent = std::filesystem::path(path_).parent_path();
  std::error_code error;
  if (!parent.empty()) std::filesystem::create_directories(parent, error);
  fd_ = ::open(path_.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
  ULY_USER_CHECK(fd_ >= 0, "train_log_metrics_path ({}): cannot write {}: {}", r.where("train_log_metrics_path"), path_, error ? error.message() : std::strerror(errno));
  ULY_USER_CHECK(!is_file() || checkpoint::take_lock(fd_), "train_log_metrics_path ({}): {} is in use by another run: wait until it has ended, or choose another file", r.where("train_log_metrics_path"), path_);
}

bool Metrics::is_file() const {
  struct stat is;
  return ::fstat(fd_, &is) == 0 && S_ISREG(is.st_mode);
}

// A file that was moved away is left as it is: what follows goes into a new one of its name.
void Metrics::follow_name() {
  struct stat ours, named;
  if (!is_file() || ::fstat(fd_, &ours) != 0) return;
  if (::stat(path_.c_str(), &named) == 0 ? named.st_ino == ours.st_ino && named.st_dev == ours.st_dev : errno != ENOENT) return;
  const int fd = ::open(path_.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) return;
  ::close(std::exchange(fd_, fd));
  if (is_file()) checkpoint::take_lock(fd_);
}

Metrics::~Metrics() {
  if (fd_ < 0) return;
  write_pending();
  ::close(fd_);
}

// Takes back what follows the first `bytes` of the file; its name, mode and links stay.
void Metrics::keep(int64_t bytes) {
  ULY_USER_CHECK(::ftruncate(fd_, bytes) == 0, "{}: cannot be cut to where the run goes on: {}", path_, std::strerror(errno));
}

void Metrics::forget_after(int64_t iter) {
  if (fd_ < 0) return;
  std::ifstream file(path_, std::ios::binary);
  std::vector<std::pair<std::string, int64_t>> lines;  // and where they begin
  int64_t at = 0;
  for (std::string line; std::getline(file, line);) {
    const int64_t bytes = static_cast<int64_t>(line.size()) + 1;
    lines.emplace_back(std::move(line), at);
    at += bytes;
  }
  int64_t last = std::numeric_limits<int64_t>::max(), end = -1;  // of the run's lines, the earliest so far
  for (; !lines.empty(); lines.pop_back()) {
    const Json told = Json::parse(lines.back().first, nullptr, false);
    if (told.is_object()) {  // the last may be half of one
      const int64_t step = told.value("iter", int64_t{0});
      if (step <= iter || step > last) break;
      last = step;
    }
    end = lines.back().second;
  }
  if (end >= 0) keep(end);
}

void Metrics::begin_in(const std::string& folder) {
  struct stat is;
  if (fd_ < 0 || !is_file() || ::fstat(fd_, &is) != 0) return;
  std::error_code error;
  const std::string path = std::filesystem::absolute(path_, error).string();
  std::ifstream file(beginning(folder));
  const Json before = file ? Json::parse(file, nullptr, false) : Json();
  if (before.is_object() && before.value("metrics", Json()) == Json(path) && before.value("bytes", Json()).is_number_integer() && before["bytes"] <= static_cast<int64_t>(is.st_size)) return keep(before["bytes"]);
  checkpoint::write_file(beginning(folder), Json{{"metrics", path}, {"bytes", static_cast<int64_t>(is.st_size)}}.dump() + "\n");
}

void Metrics::ended(const std::string& folder) {
  std::error_code ignored;
  std::filesystem::remove(beginning(folder), ignored);
}

// The reference's formula (full attention, activation checkpointing on), so that figures can be laid side by side.
double Metrics::teraflops(const StepFigures& f) const {
  const double L = static_cast<double>(spec_.L), D = static_cast<double>(spec_.D), H = static_cast<double>(spec_.H), N = static_cast<double>(spec_.N), K = static_cast<double>(spec_.K);
  const double weights = L * (3 * D * static_cast<double>(spec_.F) + D * (2 * N * H + 2 * K * H)) + static_cast<double>(spec_.V) * D;
  return (8 * weights * static_cast<double>(f.tokens) + 16 * f.sum_squared_lengths * H * N * L) / 1e12;
}

bool Metrics::write_pending() {
  while (!pending_.empty()) {
    const ssize_t n = ::write(fd_, pending_.data(), pending_.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    pending_.erase(0, static_cast<size_t>(n));  // a line that is half there is made whole by what follows
  }
  return true;
}

void Metrics::write(const Json& line) {
  follow_name();
  pending_ += line.dump() + "\n";
  const bool written = write_pending();
  if (!written && !failing_) say("METRICS CANNOT BE WRITTEN to {}: {}; the lines are kept, and training goes on", path_, std::strerror(errno));
  if (written && failing_) say("metrics are written to {} again", path_);
  failing_ = !written;
}

void Metrics::sync() {
  if (fd_ >= 0) ::fdatasync(fd_);
}

void Metrics::finish() { ULY_USER_CHECK(fd_ < 0 || write_pending(), "{}: no room on disk for the metrics", path_); }

void Metrics::evaluation(const EvalFigures& f, bool speaks) {
  if (on_) write({{"epoch", f.epoch}, {"eval_loss", f.loss}, {"eval_time", f.seconds}, {"iter", f.iter}, {"tokens", f.tokens}, {"trained_tokens", f.trained_tokens}});
  if (first_ && speaks)
    say("Eval iter:  {:>{}}/{}      | eval loss: {:.4f} | {} trained of {} tokens | {}", f.iter, std::to_string(total_steps_).size(), total_steps_, f.loss, format_count(f.trained_tokens), format_count(f.tokens), format_duration(f.seconds));
}

void Metrics::step(const StepFigures& f) {
  if (!on_) return;
  const double per_second = static_cast<double>(f.tokens) / f.step_seconds, flops = teraflops(f) / static_cast<double>(ranks_);
  Json line = {{"epoch", f.epoch},           {"grad_norm", f.grad_norm},
               {"iter", f.iter},             {"iter_tflops", flops / f.iter_seconds},
               {"iter_time", f.iter_seconds}, {"loss", f.loss},
               {"lr", f.learning_rate},      {"seqlen", f.seqlen},
               {"step_tflops", flops / f.step_seconds}, {"step_time", f.step_seconds},
               {"tokens", f.tokens},         {"tokens_per_second", per_second},
               {"trained_tokens", f.trained_tokens}};
  if (!f.not_applied.empty()) line["not_applied"] = f.not_applied;  // loss and grad_norm are null then
  write(line);
  if (!f.not_applied.empty()) return;
  ++seen_;
  const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  const double left = elapsed / static_cast<double>(seen_) * static_cast<double>(total_steps_ - f.iter);
  const int width = static_cast<int>(std::to_string(total_steps_).size());
  say("Train iter: {:>{}}/{} {:3.0f}% | loss: {:.4f} | grad norm: {:.3f} | lr: {:.3E} | seqlen: {} | tokens/s: {} | step time: {} | epoch: {:.2f} | ETA: {}", f.iter, width, total_steps_,
      100.0 * static_cast<double>(f.iter) / static_cast<double>(total_steps_), f.loss, f.grad_norm, f.learning_rate, human(f.seqlen), format_count(static_cast<int64_t>(per_second)),
      format_duration(f.step_seconds), f.epoch, format_duration(left));
}

}  // namespace uly::train
