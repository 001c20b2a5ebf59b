#include "cli/verbs.h"

#include <unistd.h>

#include <cstdio>

#include "base/check.h"
#include "base/json.h"
#include "launch/environment.h"
#include "launch/python.h"
#include "plan/plan.h"
#include "recipe/recipe.h"

namespace uly::cli {
namespace {

// What a program prints first when it is asked for its versions; empty if it cannot be run.
std::string answer_of(const std::vector<std::string>& command) {
  if (::access(command[0].c_str(), X_OK) != 0) return "";
  const launch::Output output = launch::run_and_capture(command);
  return output.exit_code == 0 ? output.text.substr(0, output.text.find('\n')) : "";
}

constexpr const char* kPythonVersions =
    "import sys, importlib.metadata as m\n"
    "def version(name):\n"
    "    try: return name + ' ' + m.version(name)\n"
    "    except m.PackageNotFoundError: return name + ' missing'\n"
    "print(', '.join(['python ' + sys.version.split()[0]] + [version(n) for n in ('torch', 'transformers', 'datasets', 'huggingface_hub')]))";

}  // namespace

int docs(const Options&) {
  const std::string text = recipe::reference_markdown();
  std::fwrite(text.data(), 1, text.size(), stdout);
  return 0;
}

int doctor(const Options& options) {
  const launch::Gpus gpus = launch::visible_gpus();
  const plan::Machine machine = plan::this_machine(false, gpus.visible);
  const std::string engine = launch::engine_path(), python = launch::python_path();
  const std::string engine_says = answer_of({engine, "--version"}), python_says = answer_of({python, "-c", kPythonVersions});
  Json out;
  out["version"] = kVersion;
  out["cores"] = machine.cores;
  out["memory_bytes"] = machine.memory_bytes;
  out["gpus"] = {{"in_machine", gpus.in_machine}, {"visible", gpus.visible}, {"CUDA_VISIBLE_DEVICES", gpus.variable ? Json(*gpus.variable) : Json()}};
  out["engine"] = {{"path", engine}, {"answer", engine_says}};
  out["python"] = {{"path", python}, {"answer", python_says}};
  out["hub"] = {{"cache", launch::hub_cache_folder()}, {"token", launch::has_hub_token()}};
  const bool well = !engine_says.empty() && !python_says.empty();
  if (options.json) {
    fmt::print("{}\n", out.dump(2));
  } else {
    const std::string shown = gpus.variable ? fmt::format(", CUDA_VISIBLE_DEVICES={}", *gpus.variable) : "";
    fmt::print("ulysses   {}\n", kVersion);
    fmt::print("machine   {}\n", machine.words);
    fmt::print("GPUs      {} visible of {}{}\n", gpus.visible, gpus.in_machine, shown);
    fmt::print("engine    {}: {}\n", engine, engine_says.empty() ? "cannot be run; `make build` makes it" : engine_says);
    fmt::print("python    {}: {}\n", python, python_says.empty() ? "cannot be run; `make setup` makes it" : python_says);
    fmt::print("hub       cache {}, {}\n", launch::hub_cache_folder(), launch::has_hub_token() ? "a token is set" : "no token is set");
  }
  return well ? 0 : static_cast<int>(Exit::kUser);
}

void not_available(const std::string& verb) { user_error("ulysses {}: not available yet", verb); }

}  // namespace uly::cli
