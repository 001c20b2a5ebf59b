#include "train/metrics.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <vector>

#include "base/check.h"
#include "base/json.h"
#include "base/log.h"
#include "base/units.h"
#include "checkpoint/hub_files.h"

namespace uly::train {
namespace {

std::string human(double n) {  // 1.92K, base 1000
  constexpr const char* kUnits[] = {"", "K", "M", "B"};
  int unit = 0;
  for (; n >= 1000 && unit < 3; ++unit) n /= 1000;
  return unit == 0 ? fmt::format("{:.0f}", n) : fmt::format("{:.2f}{}", n, kUnits[unit]);
}

}  // namespace

Metrics::Metrics(const recipe::Recipe& r, const models::Spec& spec, int64_t total_steps, int64_t ranks, bool on)
    : spec_(spec), total_steps_(total_steps), ranks_(ranks), first_(on), on_(on && r.train_log_iter_interval > 0), path_(r.train_log_metrics_path), begin_(std::chrono::steady_clock::now()) {
  if (!on_) return;
  const std::filesystem::path parent = std::filesystem::path(path_).parent_path();
  std::error_code error;
  if (!parent.empty()) std::filesystem::create_directories(parent, error);
  file_.open(path_, std::ios::app);
  ULY_USER_CHECK(file_.good(), "train_log_metrics_path ({}): cannot write {}: {}", r.where("train_log_metrics_path"), path_, error ? error.message() : std::strerror(errno));
}

namespace {

// Takes back the last run's lines from `iter` on, exclusive; nothing if that run came to `finished`.
void forget(const recipe::Recipe& r, int64_t iter, int64_t finished) {
  const std::string& path = r.train_log_metrics_path;
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  if (lines.empty()) return;
  int64_t last = std::numeric_limits<int64_t>::max();  // of the run's lines, the earliest so far
  while (!lines.empty()) {
    const Json told = Json::parse(lines.back(), nullptr, false);
    if (told.is_object()) {  // the last may be half of one
      const int64_t at = told.value("iter", int64_t{0});
      if (at >= finished) return;
      if (at <= iter || at > last) break;
      last = at;
    }
    lines.pop_back();
  }
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  const std::string beside = path + ".incomplete";
  checkpoint::write_file(beside, text);
  ULY_USER_CHECK(::rename(beside.c_str(), path.c_str()) == 0, "train_log_metrics_path ({}): cannot write {}: {}", r.where("train_log_metrics_path"), path, std::strerror(errno));
}

}  // namespace

void Metrics::forget_after(const recipe::Recipe& r, int64_t iter) { forget(r, iter, std::numeric_limits<int64_t>::max()); }

void Metrics::forget_unfinished(const recipe::Recipe& r, int64_t last_iter) { forget(r, 0, last_iter); }

// The reference's formula (full attention, activation checkpointing on), so that figures can be laid side by side.
double Metrics::teraflops(const StepFigures& f) const {
  const double L = static_cast<double>(spec_.L), D = static_cast<double>(spec_.D), H = static_cast<double>(spec_.H), N = static_cast<double>(spec_.N), K = static_cast<double>(spec_.K);
  const double weights = L * (3 * D * static_cast<double>(spec_.F) + D * (2 * N * H + 2 * K * H)) + static_cast<double>(spec_.V) * D;
  return (8 * weights * static_cast<double>(f.tokens) + 16 * f.sum_squared_lengths * H * N * L) / 1e12;
}

void Metrics::write(const Json& line) {
  file_ << line.dump() << "\n" << std::flush;
  ULY_USER_CHECK(file_.good(), "{}: no room on disk for the metrics", path_);
}

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
