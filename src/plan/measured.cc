#include "plan/measured.h"

#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "base/check.h"

namespace uly::plan {
namespace {

constexpr int kVersion = 2;

struct Field {
  const char* name;
  double Rates::*rate;
};
constexpr std::array kFields = {
    Field{"gemm_flops", &Rates::gemm_flops},       Field{"attention_forward_flops", &Rates::attention_forward_flops}, Field{"attention_backward_flops", &Rates::attention_backward_flops},
    Field{"attention_half_tokens", &Rates::attention_half_tokens},
    Field{"device_bytes", &Rates::device_bytes},   Field{"to_host_bytes", &Rates::to_host_bytes},                     Field{"to_device_bytes", &Rates::to_device_bytes},
    Field{"disk_bytes", &Rates::disk_bytes},       Field{"host_update_bytes", &Rates::host_update_bytes},             Field{"sequence_bytes", &Rates::sequence_bytes},
    Field{"node_bytes", &Rates::node_bytes},       Field{"gather_bytes", &Rates::gather_bytes},                     Field{"scatter_bytes", &Rates::scatter_bytes},
};

double rate_of(const Json& json) {
  const double rate = json.get<double>();
  if (!std::isfinite(rate) || rate < 0) throw std::invalid_argument("a rate is a number of at least 0");
  return rate;
}

Rates rates_from(const Json& json) {
  Rates rates;
  for (const Field& f : kFields) rates.*f.rate = rate_of(json.at(f.name));
  return rates;
}

}  // namespace

Json to_json(const Rates& rates) {
  Json json = Json::object();
  for (const Field& f : kFields) json[f.name] = rates.*f.rate;
  return json;
}

Json to_json(const Measured& m) {
  Json disks = Json::object();
  for (const auto& [folder, bytes] : m.disks) disks[folder] = bytes;
  return {{"processor", m.processor}, {"cores", m.cores}, {"date", m.date}, {"fp32", to_json(m.fp32)}, {"bf16", to_json(m.bf16)}, {"disks", disks}};
}

Measured measured_from(const Json& json) {
  Measured m{.processor = json.at("processor"), .cores = json.at("cores"), .date = json.at("date"), .fp32 = rates_from(json.at("fp32")), .bf16 = rates_from(json.at("bf16")), .disks = {}};
  for (const auto& [folder, bytes] : json.at("disks").items()) m.disks[folder] = rate_of(bytes);
  return m;
}

std::string text_of(const RatesFile& file) {
  Json json = {{"version", kVersion}};
  if (file.cpu) json["cpu"] = to_json(*file.cpu);
  if (file.cuda) json["cuda"] = to_json(*file.cuda);
  return json.dump(2) + "\n";
}

RatesFile rates_file_from(const std::string& text, const std::string& path) {
  const char* const advice = "measure again (ulysses doctor --measure), or remove the file";
  try {
    const Json json = Json::parse(text);
    ULY_USER_CHECK(json.at("version") == kVersion, "{}: expected rates of version {}, found version {}: {}", path, kVersion, json.at("version").dump(), advice);
    RatesFile file;
    if (json.contains("cpu")) file.cpu = measured_from(json["cpu"]);
    if (json.contains("cuda")) file.cuda = measured_from(json["cuda"]);
    return file;
  } catch (const Json::parse_error& e) {
    user_error("{}: expected rates of this machine, found no JSON from byte {} on: {}", path, e.byte, advice);
  } catch (const Json::exception& e) {
    user_error("{}: expected rates of this machine, found something else ({}): {}", path, e.what(), advice);
  } catch (const std::invalid_argument& e) {
    user_error("{}: expected rates of this machine, found something else ({}): {}", path, e.what(), advice);
  }
}

std::optional<std::string> read_rates_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    ULY_USER_CHECK(errno == ENOENT || errno == ENOTDIR, "{}: rates of this machine cannot be read: {}", path, std::strerror(errno));
    return std::nullopt;
  }
  std::string text(std::istreambuf_iterator<char>(file), {});
  ULY_USER_CHECK(!file.bad(), "{}: rates of this machine cannot be read", path);
  return text;
}

}  // namespace uly::plan
