#include "recipe/secret.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <string_view>
#include <vector>

namespace uly::recipe {
namespace {

// "aws_secret-accessKey" as {"aws", "secret", "access", "key"}.
std::vector<std::string> words_of(const std::string& key) {
  std::vector<std::string> words(1);
  const auto is = [](int (*what)(int), char c) { return what(static_cast<unsigned char>(c)) != 0; };
  for (size_t i = 0; i < key.size(); ++i) {
    const bool part = is(std::isalnum, key[i]), hump = i > 0 && is(std::isupper, key[i]) && is(std::islower, key[i - 1]);
    if ((!part || hump) && !words.back().empty()) words.emplace_back();
    if (part) words.back() += static_cast<char>(std::tolower(static_cast<unsigned char>(key[i])));
  }
  if (words.back().empty()) words.pop_back();
  return words;
}

}  // namespace

bool names_a_secret(const std::string& key) {
  static constexpr std::array<std::string_view, 20> kSecret = {"secret", "secrets", "password", "passwords", "passwd", "passphrase", "pwd", "authorization", "auth", "bearer", "credential", "credentials", "cookie", "cookies",
                                                               "apikey", "accesskey", "secretkey", "privatekey", "apitoken", "accesstoken"};
  static constexpr std::array<std::string_view, 7> kKeys = {"api", "access", "secret", "private", "account", "auth", "signing"};
  static constexpr std::array<std::string_view, 21> kOfText = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "image", "video", "audio", "vision", "special", "start", "end", "stop", "begin", "first", "last", "per", "each", "every"};
  static constexpr std::array<std::string_view, 11> kTokens = {"hf", "hub", "api", "auth", "access", "refresh", "session", "security", "bearer", "github", "wandb"};
  const auto in = [](const auto& list, const std::string& word) { return std::find(list.begin(), list.end(), word) != list.end(); };
  const std::vector<std::string> words = words_of(key);
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string before = i > 0 ? words[i - 1] : "", after = i + 1 < words.size() ? words[i + 1] : "";
    if (in(kSecret, words[i]) && words[i] != "auth") return true;
    if (words[i] == "auth" && after.empty()) return true;
    if ((words[i] == "key" || words[i] == "keys") && in(kKeys, before)) return true;
    if (words[i] == "token" && (after.empty() || after == "value") && !in(kOfText, before)) return true;
    if (words[i] == "tokens" && after.empty() && in(kTokens, before)) return true;
    if (words[i].size() > 5 && words[i].ends_with("token") && in(kTokens, words[i].substr(0, words[i].size() - 5))) return true;  // hftoken
    if (words[i] == "connection" && after == "string") return true;
  }
  return false;
}

}  // namespace uly::recipe
