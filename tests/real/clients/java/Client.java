import io.modelcontextprotocol.client.McpClient;
import io.modelcontextprotocol.client.McpSyncClient;
import io.modelcontextprotocol.client.transport.HttpClientStreamableHttpTransport;
import io.modelcontextprotocol.client.transport.HttpRequestSnapshot;
import io.modelcontextprotocol.client.transport.customizer.McpHttpClientTransportAuthorizationErrorHandler;
import io.modelcontextprotocol.spec.McpSchema;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.URI;
import java.net.URLDecoder;
import java.net.URLEncoder;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.security.SecureRandom;
import java.time.Duration;
import java.util.Arrays;
import java.util.Base64;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.stream.Collectors;
import tools.jackson.databind.json.JsonMapper;

/**
 * The Java SDK as a client of the broker: {@code Client URL}. It takes a command a line and answers each with a line of JSON,
 * as the Go clients do. The SDK leaves OAuth to its caller, by two hooks: this is what a caller writes.
 */
public class Client {
    static final String REDIRECT = "http://localhost:33418/callback";
    static final JsonMapper JSON = JsonMapper.builder().build();
    static final BufferedReader INPUT = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    static final HttpClient HTTP = HttpClient.newHttpClient();

    final URI server;
    final AtomicInteger progress = new AtomicInteger();
    volatile CountDownLatch awaited = new CountDownLatch(0);
    volatile Map<String, Object> tokens = Map.of();
    Map<String, Object> endpoints = Map.of();
    String clientId;
    String resource;

    Client(String url) {
        server = URI.create(url);
    }

    static void say(Map<String, Object> value) {
        System.out.println(JSON.writeValueAsString(value));
        System.out.flush();
    }

    // OAuth: what the SDK's two hooks need

    static Map<String, Object> get(URI where) throws IOException, InterruptedException {
        return answer(HttpRequest.newBuilder(where).build());
    }

    @SuppressWarnings("unchecked")
    static Map<String, Object> answer(HttpRequest request) throws IOException, InterruptedException {
        HttpResponse<String> answered = HTTP.send(request, HttpResponse.BodyHandlers.ofString());
        if (answered.statusCode() / 100 != 2) {
            throw new IOException(request.uri().getPath() + " answered " + answered.statusCode() + " " + answered.body());
        }
        return JSON.readValue(answered.body(), Map.class);
    }

    static String form(Map<String, String> fields) {
        return fields.entrySet().stream()
                .map(field -> field.getKey() + "=" + URLEncoder.encode(field.getValue(), StandardCharsets.UTF_8))
                .collect(Collectors.joining("&"));
    }

    static Map<String, String> query(String url) {
        return Arrays.stream(URI.create(url).getRawQuery().split("&"))
                .map(pair -> pair.split("=", 2))
                .collect(Collectors.toMap(pair -> pair[0], pair -> URLDecoder.decode(pair[1], StandardCharsets.UTF_8)));
    }

    static String random() {
        byte[] bytes = new byte[32];
        new SecureRandom().nextBytes(bytes);
        return Base64.getUrlEncoder().withoutPadding().encodeToString(bytes);
    }

    void discover() throws IOException, InterruptedException {
        Map<String, Object> described = get(server.resolve("/.well-known/oauth-protected-resource" + server.getPath()));
        resource = (String) described.get("resource");
        URI issuer = URI.create((String) ((List<?>) described.get("authorization_servers")).get(0));
        endpoints = get(issuer.resolve("/.well-known/oauth-authorization-server"));
        String body = JSON.writeValueAsString(Map.of(
                "client_name", "java-sdk",
                "redirect_uris", List.of(REDIRECT),
                "grant_types", List.of("authorization_code", "refresh_token"),
                "token_endpoint_auth_method", "none"));
        clientId = (String) answer(HttpRequest.newBuilder(URI.create((String) endpoints.get("registration_endpoint")))
                .header("Content-Type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofString(body))
                .build()).get("client_id");
    }

    void redeem(Map<String, String> fields) throws IOException, InterruptedException {
        Map<String, String> all = new LinkedHashMap<>(fields);
        all.put("client_id", clientId);
        all.put("resource", resource);
        tokens = answer(HttpRequest.newBuilder(URI.create((String) endpoints.get("token_endpoint")))
                .header("Content-Type", "application/x-www-form-urlencoded")
                .POST(HttpRequest.BodyPublishers.ofString(form(all)))
                .build());
    }

    void logIn() throws Exception {
        if (clientId == null) {
            discover();
        }
        String verifier = random();
        String state = random();
        byte[] hashed = MessageDigest.getInstance("SHA-256").digest(verifier.getBytes(StandardCharsets.US_ASCII));
        Map<String, String> asked = new LinkedHashMap<>();
        asked.put("response_type", "code");
        asked.put("client_id", clientId);
        asked.put("redirect_uri", REDIRECT);
        asked.put("state", state);
        asked.put("resource", resource);
        asked.put("code_challenge_method", "S256");
        asked.put("code_challenge", Base64.getUrlEncoder().withoutPadding().encodeToString(hashed));
        say(Map.of("authorize", endpoints.get("authorization_endpoint") + "?" + form(asked)));
        Map<String, String> answered = query(INPUT.readLine());
        if (!state.equals(answered.get("state"))) {
            throw new IOException("another state came back");
        }
        redeem(Map.of("grant_type", "authorization_code", "code", answered.get("code"),
                "redirect_uri", REDIRECT, "code_verifier", verifier));
    }

    static String sent(HttpRequestSnapshot request) {
        return request.headers().firstValue("Authorization").orElse(null);
    }

    /** Whether to send the request again: after a refresh, or else after a login. */
    synchronized boolean refused(String sent) {
        try {
            if (sent != null && !sent.equals("Bearer " + tokens.get("access_token"))) {
                return true; // another request has renewed it meanwhile
            }
            if (tokens.containsKey("refresh_token")) {
                try {
                    redeem(Map.of("grant_type", "refresh_token", "refresh_token", (String) tokens.get("refresh_token")));
                    return true;
                } catch (IOException gone) {
                    tokens = Map.of();
                }
            }
            logIn();
            return true;
        } catch (Exception error) {
            throw new IllegalStateException(error);
        }
    }

    // MCP

    McpSyncClient connect() {
        var transport = HttpClientStreamableHttpTransport.builder(server.resolve("/").toString())
                .endpoint(server.getPath())
                .addHttpRequestCustomizer((builder, method, uri, body, context) -> {
                    if (tokens.containsKey("access_token")) {
                        builder.setHeader("Authorization", "Bearer " + tokens.get("access_token"));
                    }
                })
                .authorizationErrorHandler(McpHttpClientTransportAuthorizationErrorHandler.fromSync(
                        (request, response, context) -> response.statusCode() == 401 && refused(sent(request))))
                .build();
        var client = McpClient.sync(transport)
                .requestTimeout(Duration.ofSeconds(60))
                .initializationTimeout(Duration.ofSeconds(60))
                .capabilities(McpSchema.ClientCapabilities.builder().elicitation().build())
                .elicitation(asked -> McpSchema.ElicitResult.builder(McpSchema.ElicitResult.Action.ACCEPT)
                        .content(Map.of("answer", "scripted"))
                        .build())
                .progressConsumer(told -> {
                    progress.incrementAndGet();
                    awaited.countDown();
                })
                .build();
        client.initialize();
        return client;
    }

    @SuppressWarnings("unchecked")
    Map<String, Object> call(McpSyncClient client, String name, String arguments) throws InterruptedException {
        Map<String, Object> values = JSON.readValue(arguments, Map.class);
        progress.set(0);
        awaited = new CountDownLatch(name.equals("get_progress") ? (Integer) values.get("n") : 0);
        var request = McpSchema.CallToolRequest.builder(name)
                .arguments(values)
                .progressToken("told")
                .build();
        var result = client.callTool(request);
        awaited.await(30, TimeUnit.SECONDS); // the SDK tells of progress on another thread than it answers on
        String text = result.content().stream()
                .filter(part -> part instanceof McpSchema.TextContent)
                .map(part -> ((McpSchema.TextContent) part).text())
                .collect(Collectors.joining());
        return Map.of("text", text, "is_error", Boolean.TRUE.equals(result.isError()), "progress_count", progress.get());
    }

    public static void main(String[] words) throws Exception {
        Client self = new Client(words[0]);
        McpSyncClient client;
        try {
            client = self.connect();
        } catch (RuntimeException error) {
            say(Map.of("error", String.valueOf(error)));
            System.exit(1);
            return;
        }
        say(Map.of("version", client.getCurrentInitializationResult().protocolVersion()));
        for (String line = INPUT.readLine(); line != null && !line.equals("quit"); line = INPUT.readLine()) {
            String[] parts = line.split(" ", 3);
            try {
                switch (parts[0]) {
                    case "call" -> say(Map.of("call", self.call(client, parts[1], parts.length > 2 ? parts[2] : "{}")));
                    case "expire" -> say(Map.of("expired", true)); // it learns so from the 401
                    default -> say(Map.of("error", "unknown command " + parts[0]));
                }
            } catch (RuntimeException error) {
                say(Map.of("error", String.valueOf(error)));
            }
        }
        client.closeGracefully();
        System.exit(0);
    }
}
