// One rank: `ulysses-engine train RECIPE --model FOLDER --tokens FILE [...]`, its place in the environment. Started by
// `ulysses`; the last place where a rank's error becomes a sentence and an exit code.
#include <c10/util/Exception.h>
#include <c10/util/Logging.h>
#include <torch/version.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <thread>

#include "base/check.h"
#include "cli/verbs.h"
#include "train/measure.h"
#include "train/preempt.h"
#include "train/rehearse.h"
#include "train/train.h"

namespace uly::cli {
namespace {

// Rank 0 speaks as `ulysses` does; of other ranks the launcher needs to know which line is the error.
const char* prefix() {
  const char* rank = std::getenv("RANK");
  return rank == nullptr || std::string(rank) == "0" ? "" : "error: ";
}

// Where several ranks run, one that lost a peer lets that peer speak first: the launcher ends this one meanwhile. Where it has begun to,
// by a signal that was taken for a wish to save, it needs its grace for it.
constexpr std::chrono::milliseconds kPeerSpeaksFirst{2000}, kGrace{6000};

[[noreturn]] void end(const std::string& message, Exit exit) {
  static std::atomic_flag ending;
  while (ending.test_and_set()) std::this_thread::sleep_for(kGrace);  // another thread speaks
  if (exit == Exit::kDevice && std::getenv("RANK") != nullptr) {
    for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) std::signal(signal, SIG_DFL);
    std::this_thread::sleep_for(train::noticed_signal() != 0 ? kGrace : kPeerSpeaksFirst);
  }
  if (!message.empty()) fmt::print(stderr, "{}{}\n", prefix(), message);
  std::fflush(stdout);
  std::fflush(stderr);
  // Other threads may still wait for peers that will not come.
  std::_Exit(static_cast<int>(exit));
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

// Says what the exception means and ends the process.
[[noreturn]] void end_by(const std::exception_ptr& exception) {
  const bool debug = std::getenv("ULYSSES_DEBUG") != nullptr;
  try {
    std::rethrow_exception(exception);
  } catch (const InternalError& e) {
    end(fmt::format("internal error: {}", e.what()), e.exit());
  } catch (const Error& e) {
    end(e.what(), e.exit());
  } catch (const c10::Error& e) {
    const std::string what = debug ? e.what() : first_line(e.what_without_backtrace());
    if (what.find("can't allocate memory") != std::string::npos) end(fmt::format("this machine has too little memory left: {}", what), Exit::kDevice);
    end(fmt::format("internal error: {}{}", what, debug ? "" : "; set ULYSSES_DEBUG=1 for the place"), Exit::kInternal);
  } catch (const std::bad_alloc&) {
    end("this machine has too little memory left", Exit::kDevice);
  } catch (const std::exception& e) {
    end(fmt::format("internal error: {}", debug ? std::string(e.what()) : first_line(e.what())), Exit::kInternal);
  } catch (...) {
    end("internal error: an exception without a text", Exit::kInternal);
  }
}

// An exception that leaves another thread, or a destructor, comes here.
[[noreturn]] void on_terminate() {
  const std::exception_ptr exception = std::current_exception();
  if (exception) end_by(exception);
  end("internal error: terminated without an exception", Exit::kInternal);
}

int run(int argc, char** argv) {
  CLI::App app{"One rank of a training run; `ulysses` starts it", "ulysses-engine"};
  app.set_version_flag("--version", fmt::format("ulysses-engine {}, torch {}", kVersion, TORCH_VERSION));
  app.require_subcommand(1);
  CLI::App* train = app.add_subcommand("train", "Train as the recipe says");
  train::Job job;
  std::vector<std::string> words;
  std::string device = "cpu";
  train->add_option("words", words, "RECIPE.yml, then key.path=value ...")->required();
  train->add_option("--model", job.model_folder, "folder with config.json and weights")->required();
  CLI::Option* tokens = train->add_option("--tokens", job.tokens_path, "token file");
  train->add_option("--eval-tokens", job.eval_tokens_path, "token file to evaluate on");
  train->add_flag("--rehearse", job.rehearse, "one step without data, weights and arithmetic")->excludes(tokens);
  train->add_flag("--json", job.json, "--rehearse: for programs");
  train->add_option("--tokenizer", job.tokenizer_folder, "folder whose tokenizer is saved with the model; without it, the model's");
  train->add_option("--dump", job.dump_folder, "folder for the loss and gradients of each step");
  train->add_option("--device", device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}));
  train->add_flag("--restart-data", job.restart_data, "go on from a state with the data from its beginning");
  train->add_option("--began", job.began, "when the job was started for the first time, in seconds of this machine's steady clock");
  train->add_option("--profile", job.profile, "file for a Chrome trace of the third step");
  train->add_option("--rates", job.rates_path, "rates that were measured on this machine");
  const CLI::App* leave = app.add_subcommand("leave", "Tell the ranks of this job, before they train, that this one was asked to stop");
  CLI::App* measure = app.add_subcommand("measure", "How fast this machine is, as JSON");
  train::Measure what;
  measure->add_option("--device", device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}));
  measure->add_option("--disk", what.folders, "folders on disks to be measured");
  measure->add_option("--attention", what.attention, "on a GPU: cudnn or flash");
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    user_error("ulysses-engine: {}", e.what());
  }
  if (leave->parsed()) {
    train::leave();
    return static_cast<int>(Exit::kPreempted);
  }
  if (measure->parsed()) {
    train::admit_signals();
    what.cuda = device == "cuda";
    fmt::print("{}\n", train::measure(what).dump());
    return 0;
  }
  job.recipe_path = words[0];
  job.overrides.assign(words.begin() + 1, words.end());
  job.cuda = device == "cuda";
  if (const char* faults = std::getenv("ULYSSES_DISK_FAULTS")) job.disk_faults = faults;
  if (job.rehearse) train::admit_signals();
  if (job.rehearse) return train::rehearse(job);
  ULY_USER_CHECK(!job.tokens_path.empty(), "ulysses-engine: --tokens is required");
  return train::run(job);
}

}  // namespace
}  // namespace uly::cli

int main(int argc, char** argv) {
  std::set_terminate(uly::cli::on_terminate);
  if (std::getenv("ULYSSES_DEBUG") == nullptr) FLAGS_caffe2_log_level = c10::GLOG_FATAL;  // what fails is said by us, once
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a file size limit is an error of write(), said in a sentence
  try {
    const int code = uly::cli::run(argc, argv);
    std::fflush(stdout);
    return code;
  } catch (...) {
    uly::cli::end_by(std::current_exception());
  }
}
