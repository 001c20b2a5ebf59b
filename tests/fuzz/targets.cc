// What reads files from outside, fed with anything: the only way out is a result or a UserError. FUZZ_TARGET names which (recipe, hostfile, env,
// safetensors, manifest, tokens). With libFuzzer (`make fuzz`), or, without it, as a program that reads the files and folders it is given.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "base/check.h"
#include "base/safetensors.h"
#include "checkpoint/state.h"
#include "data/batch.h"
#include "data/pack.h"
#include "data/token_file.h"
#include "launch/exports.h"
#include "launch/hostfile.h"
#include "recipe/recipe.h"

namespace {

namespace fs = std::filesystem;

// A folder in memory, of this process.
const std::string& folder() {
  static const std::string made = [] {
    std::string name = "/dev/shm/ulysses-fuzz-XXXXXX";
    if (::mkdtemp(name.data()) == nullptr) std::abort();
    static std::string mine = name;
    std::atexit([] {
      std::error_code ignored;
      fs::remove_all(mine, ignored);
    });
    return name;
  }();
  return made;
}

std::string put(const std::string& name, const std::string& bytes) {
  const std::string path = folder() + "/" + name;
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
  return path;
}

volatile uint64_t sink;
void touch(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) sink = sink + static_cast<const unsigned char*>(data)[i];
}

void recipe(const std::string& bytes) { uly::recipe::load(put("run.yml", bytes), {}); }

void hostfile(const std::string& bytes) {
  // The first line is what is asked of the hosts that the rest names.
  const size_t end = std::min(bytes.find('\n'), bytes.size());
  const auto hosts = uly::launch::read_hostfile(put("hosts", bytes.substr(std::min(end + 1, bytes.size()))));
  uly::launch::choose_hosts(hosts, {.include = bytes.substr(0, end)});
}

void env(const std::string& bytes) {
  put(".deepspeed_env", bytes);
  ::setenv("HOME", folder().c_str(), 1);
  uly::launch::exported_variables();
}

void safetensors(const std::string& bytes) {
  const uly::SafetensorsFile file(put("model.safetensors", bytes));
  for (const auto& [name, tensor] : file.tensors()) touch(tensor.data, tensor.bytes);
}

// As it stands; and, where it is JSON, as a manifest that was written so.
void manifest(const std::string& bytes) {
  const auto read = [](const std::string& state) {
    uly::checkpoint::StateReader reader(state);
    reader.check_model({{"architecture", "A"}, {"units", {{{"name", "u"}, {"elements", 4}, {"tensors", uly::Json::array()}}}}});
    float values[4];
    reader.read("u", uly::checkpoint::Moment::kMaster, 0, 4, values);
  };
  const std::string plain = folder() + "/plain";
  fs::create_directories(plain);
  std::ofstream(plain + "/manifest.json", std::ios::binary | std::ios::trunc) << bytes;
  try {
    read(plain);
  } catch (const uly::UserError&) {
  }
  int64_t depth = 0;
  for (const char c : bytes)
    if ((depth += (c == '[' || c == '{') - (c == ']' || c == '}')) > 50) return;  // nobody writes such a one, and the reader has seen it
  uly::Json facts = uly::Json::parse(bytes, nullptr, false);
  if (!facts.is_object()) return;
  std::vector<uly::Json> files;
  if (const auto found = facts.find("files"); found != facts.end() && found->is_array())
    for (const uly::Json& one : *found) files.push_back(one);
  const std::string state = folder() + "/states/global_step_1";
  fs::create_directories(state + ".incomplete");
  uly::checkpoint::publish_state(state + ".incomplete", state, facts, files);
  read(state);
}

void tokens(const std::string& bytes) {
  const uly::data::TokenFile file(put("tokens.safetensors", bytes));
  for (int64_t i = 0; i < std::min<int64_t>(file.num_samples(), 4); ++i) file.words(i);
  const uly::data::Packs packs = uly::data::make_packs(file, nullptr, {.max_length = 64, .pack = true});
  for (int64_t i = 0; i < std::min<int64_t>(packs.size(), 16); ++i) uly::data::make_batch(file, packs, {i}, 64, 2, 1);
}

void run(const std::string& bytes) {
  static const std::map<std::string, void (*)(const std::string&)> targets = {{"recipe", recipe}, {"hostfile", hostfile}, {"env", env}, {"safetensors", safetensors}, {"manifest", manifest}, {"tokens", tokens}};
  static const auto target = [] {
    const char* name = std::getenv("FUZZ_TARGET");
    const auto found = targets.find(name ? name : "");
    if (found == targets.end()) std::fprintf(stderr, "FUZZ_TARGET: expected recipe, hostfile, env, safetensors, manifest or tokens\n"), std::exit(2);
    return found->second;
  }();
  try {
    target(bytes);
  } catch (const uly::UserError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, size_t size) {
  run(std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}

#ifdef ULYSSES_REPLAY
int main(int argc, char** argv) {
  int64_t count = 0;
  for (int i = 1; i < argc; ++i)
    for (const auto& entry : fs::recursive_directory_iterator(argv[i])) {
      if (!entry.is_regular_file()) continue;
      std::ifstream file(entry.path(), std::ios::binary);
      run(std::string(std::istreambuf_iterator<char>(file), {}));
      ++count;
    }
  std::printf("%lld inputs\n", static_cast<long long>(count));
  return count > 0 ? 0 : 1;
}
#endif
