// Pages: the figures of the other part, written by the package.
const http = require("http");
const pages = require("pages");

const figures = () =>
  new Promise((resolve, reject) => {
    const asked = http.get({ host: "127.0.0.1", port: process.env.API_PORT }, (answer) => {
      let text = "";
      answer.on("data", (part) => (text += part));
      answer.on("end", () => resolve(JSON.parse(text)));
    });
    asked.on("error", reject);
  });

http
  .createServer((_, answer) => {
    figures().then(
      (known) => answer.end(pages.page(known)),
      (error) => {
        answer.statusCode = 503;
        answer.end(`${error}\n`);
      },
    );
  })
  .listen(Number(process.env.PORT), "0.0.0.0");
